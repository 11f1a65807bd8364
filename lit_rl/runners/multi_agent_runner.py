"""Steps copies of a multi-agent environment with a policy that all agents share. A plain class, as `EnvRunner` is.

Each agent of each copy is a slot with a time line of its own, which has a row for each time the agent acted. The row is
complete when the agent is asked again, or leaves; rewards in between are summed into it. One that is not complete at a
fragment's end is carried over to the next, with the log-probability and version it was sampled with.

Shapes: B slots, N agents that act now.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from lit_rl.envs.copies import Asked, Copies, Events, Outcome, returns_by_name
from lit_rl.envs.make import EnvConfig
from lit_rl.errors import EnvError, OptionError, env_error
from lit_rl.policy import Policy
from lit_rl.runners.acting import actions_of, final_observation, observations, sample
from lit_rl.runners.faults import FaultTolerance, Phase, Watchdog
from lit_rl.runners.fragment import Episode, Fragment
from lit_rl.runners.ledger import Entry
from lit_rl.runners.survival import Survival
from lit_rl.runners.time_lines import TimeLines
from lit_rl.trees import Tree, map_tree


class MultiAgentEnvRunner:
    """Collects fragments of B time lines from `num_envs` copies of an environment, for one policy of all agents.

    A fragment is `rollout_length` calls of each copy's `step`, and has as many rows as its agents acted. A copy that
    raises is rebuilt alone: its agents' episodes end by truncation before what they did last.

    Args:
        env: how to make the copies.
        policy: what acts; the runner's own copy, on the CPU.
        num_envs: how many copies.
        rollout_length: env steps of each copy in a fragment.
        seed: of the copies' first resets and of the actions.
        info_metrics: keys of `info[agent]` to report for each episode.
        keep_states: keep the state before every row, instead of the first alone.
        faults: how many failures of copies are survived.
        watchdog: what is told of every phase.
        reward_scale: rewards of fragments are multiplied by it, those of episodes' returns are not.
        reward_clip: rewards of fragments, as summed and scaled, are clipped to plus or minus this; None leaves them.
    """

    def __init__(
        self,
        env: EnvConfig,
        policy: Policy,
        *,
        num_envs: int,
        rollout_length: int,
        seed: np.random.SeedSequence,
        info_metrics: Sequence[str] = (),
        keep_states: bool = False,
        faults: FaultTolerance = FaultTolerance(),  # noqa: B008 - it is frozen
        watchdog: Watchdog | None = None,
        reward_scale: float = 1.0,
        reward_clip: float | None = None,
    ):
        self.policy = policy.eval()
        self.policy_version = 0
        self._epsilons = [0.0] * rollout_length
        self._env, self._num_envs, self._rollout_length = env, num_envs, rollout_length
        self._watchdog = watchdog or Watchdog()
        self._survival = Survival(faults, self._watchdog)
        self._reward_scale, self._reward_clip = reward_scale, reward_clip
        self._accounted = 0  # env steps in fragments so far
        self._discarded: Counter[str] = Counter()  # env steps since, that are in no fragment
        self._unproven: set[int] = set()  # copies that were rebuilt and did not make a step since
        env_seed, action_seed = seed.spawn(2)
        self._seeds = env_seed.spawn(num_envs)
        policy.rng = np.random.default_rng(action_seed)
        self._watchdog.enter(Phase.INIT)
        self._copies = Copies(env, num_envs, info_metrics, self._recover)
        _check_spaces(self._copies, policy)
        num_slots = self._copies.num_slots
        self._state = policy.initial_state(num_slots)
        has_memory = keep_states and policy.has_memory
        self._lines = TimeLines(policy.spec, num_slots, state=self._state, keep_states=has_memory)
        self._is_init = np.zeros(num_slots, np.bool_)  # of the slots whose agents act next
        self._asked: list[Asked] = []
        self._slots: np.ndarray  # of those, [N]
        self._obs: Tree  # what they see
        events = Events()
        for b, child in enumerate(self._seeds):
            self._begin(b, _number(child), events)
        self._take(events)
        self._watchdog.enter(Phase.IDLE)

    @property
    def executed(self) -> int:
        """Env steps so far."""
        return self._watchdog.executed

    def set_version(self, version: int, epsilons: Sequence[float] = (0.0,)) -> None:
        """Say what the next fragments are collected with: see `EnvRunner.set_version`."""
        self.policy.see_weights()
        self.policy_version = version
        self._epsilons = [epsilon for epsilon in epsilons for _ in range(self._rollout_length)]

    def sample(self) -> Fragment:
        """Step every copy `rollout_length` times for each of `epsilons`.

        Raises:
            EnvError: if copies raise more often than is survived, or give what they must not give.
        """
        try:
            return self._collect()
        finally:
            self._watchdog.enter(Phase.IDLE)

    def close(self) -> None:
        self._copies.close()

    def get_state(self) -> dict[str, Any]:
        """The action noise's generator, as plain data; episodes under way are not in it."""
        return {"action_rng": self.policy.rng.bit_generator.state}

    def set_state(self, state: dict[str, Any]) -> int:
        """Go on from what `get_state` returned; returns how many episodes could not, and start afresh: all."""
        self.policy.rng.bit_generator.state = state["action_rng"]
        return self._num_envs

    def _collect(self) -> Fragment:
        policy, watchdog, episodes, failed = self.policy, self._watchdog, list[Episode](), 0
        for epsilon in self._epsilons:
            policy.epsilon = epsilon
            actions = iter(())
            if self._asked:
                is_init = self._is_init[self._slots]
                action, log_prob, before = sample(policy, self._obs, self._state, self._slots, is_init, policy.sample)
                self._lines.act(self._slots, action, log_prob, before, self.policy_version)
                actions = actions_of(policy, action)
            watchdog.enter(Phase.STEP)
            events = self._copies.step(actions)
            watchdog.executed += self._num_envs
            failed += len(events.failed)
            self._unproven.intersection_update(events.failed)
            for outcome in events.over:
                episodes.append(_episode(self._copies, outcome))
                self._begin(outcome.copy, None, events)
            self._take(events)
        if failed:
            self._discarded["env_error"] += failed
        num_rows = self._lines.num_complete
        rows, finals = self._lines.fragment(self.policy_version)
        self._check_finite(rows.views() | finals.views())
        reward = rows.views()["reward"]
        if self._reward_scale != 1.0:
            reward *= np.float32(self._reward_scale)
        if self._reward_clip is not None:
            np.clip(reward, -self._reward_clip, self._reward_clip, out=reward)
        delivered = self._num_envs * len(self._epsilons) - failed
        entry = Entry(self._accounted, watchdog.executed, delivered, dict(self._discarded), num_rows)
        fragment = Fragment(rows, finals, episodes, self.policy_version, entry, tuple(self._survival.failures))
        self._accounted = watchdog.executed
        self._discarded.clear()
        self._survival.failures.clear()
        return fragment

    def _begin(self, b: int, seed: int | None, events: Events) -> None:
        """Begin an episode in copy b."""
        self._watchdog.enter(Phase.RESET)
        self._copies.begin(b, seed, events)
        self._watchdog.enter(Phase.STEP)

    def _take(self, events: Events) -> None:
        """Take in what a step brought, and who acts next."""
        lines = self._lines
        for slot, reward in events.credited:
            lines.credit(slot, reward)
        for slot in events.dropped:
            lines.drop(slot)
        for slot, terminated, truncated, obs in events.ended:
            lines.end(slot, terminated, truncated, None if obs is None else final_observation(self.policy, obs))
        if events.again:
            lines.complete(events.again, [False] * len(events.again), [False] * len(events.again))
        self._is_init[events.again] = False
        self._is_init[events.begun] = True
        self._asked = self._copies.asked()
        self._slots = np.array([one.slot for one in self._asked], np.int64)
        if self._asked:
            obs = observations(self.policy, self._asked, self._copies.roster.num_slots)
            self._obs = map_tree(np.array, obs)  # a copy: environments may write into what they gave
            lines.ask(self._slots, self._obs, self._is_init[self._slots])

    def _recover(self, b: int, what: str, error: Exception) -> int:
        """Copy b raised: the seed of the one in its place."""
        if b not in self._unproven:
            self._survival.went_well()
        self._unproven.add(b)
        self._survival.survive(env_error(self._env.env_id, f"raised in {what}", error), f"Copy {b} is")
        self._watchdog.enter(Phase.INIT)
        return _number(self._seeds[b].spawn(1)[0])

    def _check_finite(self, view: dict[str, np.ndarray]) -> None:
        """Refuse numbers that are not finite, in rows and what follows them."""
        for path, array in view.items():
            if array.dtype.kind != "f" or math.isfinite(array.sum()) or np.isfinite(array).all():
                continue
            slot = int(np.argwhere(~np.isfinite(array))[0][0])
            value = array[slot][~np.isfinite(array[slot])].flat[0]
            copy, at = divmod(slot, self._copies.roster.num_slots)
            names = self._copies.roster.names
            who = f"agent {names[at]!r}" if len(names) == self._copies.roster.num_slots else f"slot {at}"
            what = path.removeprefix("last_").removeprefix("final_").split("/")[0]
            mend = "The policy has diverged: lower lr." if what in OF_POLICY else "Mend the environment."
            raise EnvError(
                f"env={self._env.env_id}: {what}={value} of {who} of copy {copy}: expected finite numbers. {mend}"
            )


OF_POLICY = ("action", "action_log_prob", "state")


def _check_spaces(copies: Copies, policy: Policy) -> None:
    spec = policy.spec
    for name in copies.roster.names:
        found = copies.spaces_of(name)
        if found != (spec.observation_space, spec.action_space):
            raise OptionError(
                f"The policy was made for {spec.env_id} (observation {spec.observation_space}, action "
                f"{spec.action_space}), but agent {name!r} has observation {found[0]}, action {found[1]}. Use the "
                "environment and env_kwargs it was trained with."
            )


def _episode(copies: Copies, outcome: Outcome) -> Episode:
    returns = returns_by_name(copies.roster, outcome.returns)
    return Episode(math.fsum(outcome.returns.values()), outcome.length, outcome.info, returns=returns)


def _number(seed: np.random.SeedSequence) -> int:
    return int(seed.generate_state(1)[0])
