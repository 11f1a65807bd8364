"""Steps copies of a multi-agent environment with one policy for all agents, or several. A plain class, as `EnvRunner`.

Each agent of each copy is a slot with a time line of its own, which has a row for each time the agent acted. The row is
complete when the agent is asked again, or leaves; rewards in between are summed into it. One that is not complete at a
fragment's end is carried over to the next, with the log-probability and version it was sampled with.

Shapes: B slots, N agents that act now.
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from lit_rl.central import kind_of
from lit_rl.envs.copies import Copies, Events, Outcome, returns_by_name
from lit_rl.envs.make import EnvConfig
from lit_rl.errors import EnvError, env_error
from lit_rl.policy import Policy, PolicySet
from lit_rl.runners.book import Book
from lit_rl.runners.cast import Cast
from lit_rl.runners.faults import FaultTolerance, Phase, Watchdog
from lit_rl.runners.finite import OF_POLICY
from lit_rl.runners.fragment import NOTHING, Episode, Epsilons, Fragment, Part
from lit_rl.runners.ledger import Entry
from lit_rl.runners.stepping import scale_rewards
from lit_rl.runners.survival import Survival
from lit_rl.runners.time_lines import TimeLines
from lit_rl.runners.transport import Packed


class MultiAgentEnvRunner:
    """Collects fragments of B time lines from `num_envs` copies of an environment, for each policy that is trained.

    A fragment is `rollout_length` calls of each copy's `step`, and has as many rows as its agents acted. A copy that
    raises is rebuilt alone: its agents' episodes end by truncation before what they did last.

    Args:
        env: how to make the copies.
        policy: what acts, one for all agents or several; the runner's own copy, on the CPU.
        num_envs: how many copies.
        rollout_length: env steps of each copy in a fragment.
        seed: of the copies' first resets and of the actions.
        info_metrics: keys of `info[agent]` to report for each episode.
        keep_states: keep the state before every row, instead of the first alone; of several policies for which.
        faults: how many failures of copies are survived.
        watchdog: what is told of every phase.
        replayable: keep what `get_state` needs of the episodes under way.
        reward_scale: rewards of fragments are multiplied by it, those of episodes' returns are not.
        reward_clip: rewards of fragments, as summed and scaled, are clipped to plus or minus this; None leaves them.
        new_seed: of the generators of policies that are added later; None takes one that depends on `seed`.
    """

    def __init__(
        self,
        env: EnvConfig,
        policy: Policy | PolicySet,
        *,
        num_envs: int,
        rollout_length: int,
        seed: np.random.SeedSequence,
        info_metrics: Sequence[str] = (),
        keep_states: bool | Collection[str] = False,
        faults: FaultTolerance = FaultTolerance(),  # noqa: B008 - it is frozen
        watchdog: Watchdog | None = None,
        replayable: bool = False,
        reward_scale: float = 1.0,
        reward_clip: float | None = None,
        new_seed: np.random.SeedSequence | None = None,
    ):
        self.policy = policy.eval()
        self.policy_version = 0
        self._epsilons: list[Any] = [0.0] * rollout_length
        self._env, self._num_envs, self._rollout_length = env, num_envs, rollout_length
        self._watchdog = watchdog or Watchdog()
        self._survival = Survival(faults, self._watchdog)
        self._reward_scale, self._reward_clip = reward_scale, reward_clip
        self._accounted = 0  # env steps in fragments so far
        self._discarded: Counter[str] = Counter()  # env steps since, that are in no fragment
        self._abandoned = 0  # episodes that were broken off since
        self._unproven: set[int] = set()  # copies that were rebuilt and did not make a step since
        env_seed, action_seed, other_seed = seed.spawn(3)
        self._new_seed = new_seed or other_seed
        self._seeds = [np.random.default_rng(child) for child in env_seed.spawn(num_envs)]  # what gives episodes theirs
        policy.rng = np.random.default_rng(action_seed)
        self._watchdog.enter(Phase.INIT)
        self._replayable = replayable
        learned = [policy.learned[i] for i in policy.trained] if isinstance(policy, PolicySet) else [policy]
        kinds = {kind for each in learned if (kind := kind_of(each.spec.central_space)) is not None}
        self._copies = Copies(env, num_envs, info_metrics, self._recover, remembers=replayable, central=kinds)
        self._cast = Cast(policy, self._copies)
        self._book = Book(policy, self._cast, self._copies, keep_states=keep_states)
        self._lines = self._book.lines
        events = Events()
        for b in range(num_envs):
            self._begin(b, events)
        self._book.take(events)
        self._watchdog.enter(Phase.IDLE)

    @property
    def executed(self) -> int:
        """Env steps so far."""
        return self._watchdog.executed

    def set_version(self, version: int, epsilons: Epsilons = (0.0,)) -> None:
        """Say what the next fragments are collected with: see `EnvRunner.set_version`."""
        self.policy.see_weights()
        self.policy_version = version
        self._epsilons = [epsilon for epsilon in epsilons for _ in range(self._rollout_length)]

    def follow(self, policies: PolicySet, keep_states: bool | Collection[str] = False) -> None:
        """Act by other policies from the next fragment on. Those that were there before go on, and agents keep them.

        Where one acted that is not there any more the copy begins another episode; what its agents did last is in no
        fragment.

        Args:
            policies: in the place of the runner's own, and its own from now on.
            keep_states: see above; as it was, for those that were there before.
        """
        assert isinstance(self.policy, PolicySet)
        policies.succeed(self.policy, self._new_seed)
        self.policy = policies.eval()
        afresh, events = self._cast.follow(policies), Events()
        self._book.follow(policies, keep_states)
        try:
            for b in afresh:
                self._begin_afresh(b, events)
        finally:
            self._watchdog.enter(Phase.IDLE)
        self._abandoned += len(afresh)
        self._book.fit()
        self._book.take(events)

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
        """The generators and, if `replayable`, the episodes under way, as plain data and tensors."""
        policy: Any = self.policy
        rng = policy.rng_state() if isinstance(policy, PolicySet) else policy.rng.bit_generator.state
        state = {"action_rng": rng}
        if isinstance(policy, PolicySet):
            state |= {"policies": dict(policy.numbers), "mapping": policy.mapping.plain}
        if self._replayable:
            state["copies"] = [self._copies.state(b) for b in range(self._num_envs)]
            state["seeds"] = [rng.bit_generator.state for rng in self._seeds]
            state["cast"] = self._cast.state()
            state["lines"] = [None if lines is None else lines.state() for lines in self._lines]
        return state

    def set_state(self, state: dict[str, Any]) -> int:
        """Go on from what `get_state` returned; returns how many episodes could not, and start afresh.

        Each copy is reset as it was when its episode began, and given the episode's actions again. If its agents then
        observe what they did, it goes on, unless the mapping now gives them other policies.
        """
        policy = self.policy
        if not self._replayable or len(state.get("copies", ())) != self._num_envs:
            return self._num_envs
        if isinstance(policy, PolicySet) and state.get("policies", policy.numbers) != policy.numbers:
            return self._num_envs
        events, restarted = Events(), 0
        for rng, saved in zip(self._seeds, state["seeds"]):
            rng.bit_generator.state = saved
        if isinstance(policy, PolicySet) and state.get("mapping") == policy.mapping.plain:
            self._book.make_room(state)
        for b, saved in enumerate(state["copies"]):
            slots = self._slots_of(b)
            if self._book.fits(state, slots) and self._copies.begin_again(b, saved):
                self._cast.load(state["cast"], b, slots)
                for lines, of_lines in zip(self._lines, state["lines"]):
                    if lines is not None:
                        lines.load(of_lines, slots)
                continue
            self._begin_afresh(b, events)
            restarted += 1
        self._book.fit()
        self._book.take(events)
        if isinstance(policy, PolicySet):
            policy.load_rng_state(state["action_rng"])
        else:
            policy.rng.bit_generator.state = state["action_rng"]
        return restarted

    def _collect(self) -> Fragment:
        cast, watchdog, episodes, failed = self._cast, self._watchdog, list[Episode](), 0
        trained: Any = [
            (actor.policy_id, actor.policy) for actor, lines in zip(cast.actors, self._lines) if lines is not None
        ]
        for epsilons in self._epsilons:
            for policy_id, policy in trained:
                epsilon = epsilons.get(policy_id, 0.0) if isinstance(epsilons, Mapping) else epsilons
                if policy.epsilon != epsilon:  # to set it takes longer
                    policy.epsilon = epsilon
            actions: list[Any] = [None] * sum(len(group.asked) for group in cast.groups)
            for group, choice, chosen in cast.act(lambda policy: policy.sample):
                self._book.act(group, choice, self.policy_version)
                for place, action in zip(group.places, chosen):
                    actions[place] = action
            watchdog.enter(Phase.STEP)
            events = self._copies.step(iter(actions))
            watchdog.executed += self._num_envs
            failed += len(events.failed)
            self._unproven.intersection_update(events.failed)
            for b in events.failed:
                cast.begin(b, self._copies.seed_of(b))
            for outcome in events.over:
                episodes.append(episode_of(self._copies, cast, outcome))
                self._begin(outcome.copy, events)
            self._book.take(events)
        if failed:
            self._discarded["env_error"] += failed
        num_rows = sum(lines.num_complete for lines in self._lines if lines is not None)
        numbers = self.policy.numbers if isinstance(self.policy, PolicySet) else {"": 0}
        parts = {
            actor.policy_id: Part(*self._finished(lines), lines.slots, numbers[actor.policy_id])
            for actor, lines in zip(cast.actors, self._lines)
            if lines is not None
        }
        self._book.fit_if_needed()
        delivered = self._num_envs * len(self._epsilons) - failed
        entry = Entry(self._accounted, watchdog.executed, delivered, dict(self._discarded), num_rows, self._abandoned)
        rows, finals = parts[""][:2] if "" in parts else (NOTHING, NOTHING)
        fragment = Fragment(rows, finals, episodes, self.policy_version, entry, tuple(self._survival.failures))
        if "" not in parts:
            fragment = fragment._replace(parts=parts)
        self._accounted, self._abandoned = watchdog.executed, 0
        self._discarded.clear()
        self._survival.failures.clear()
        return fragment

    def _finished(self, lines: TimeLines) -> tuple[Packed, Packed]:
        """What is complete of time lines, with rewards as they are learned from."""
        rows, finals = lines.fragment(self.policy_version)
        view = rows.views()
        self._check_finite(lines, view | finals.views())
        scale_rewards(view["reward"], self._reward_scale, self._reward_clip)
        return rows, finals

    def _begin_afresh(self, b: int, events: Events) -> None:
        """Begin an episode in copy b instead of the one under way, of which nothing is learned any more."""
        for lines in self._lines:
            if lines is not None:
                lines.clear(self._slots_of(b))
        self._begin(b, events)

    def _slots_of(self, b: int) -> np.ndarray:
        size = self._copies.roster.num_slots
        return np.arange(b * size, (b + 1) * size)

    def _begin(self, b: int, events: Events) -> None:
        """Begin an episode in copy b, with a seed of its own."""
        seed = self._next_seed(b)
        self._watchdog.enter(Phase.RESET)
        self._cast.begin(b, seed)
        self._copies.begin(b, seed, events)
        self._watchdog.enter(Phase.STEP)

    def _recover(self, b: int, what: str, error: Exception) -> int:
        """Copy b raised: the seed of the one in its place."""
        if b not in self._unproven:
            self._survival.went_well()
        self._unproven.add(b)
        self._survival.survive(env_error(self._env.env_id, f"raised in {what}", error), f"Copy {b} is")
        self._watchdog.enter(Phase.INIT)
        return self._next_seed(b)

    def _next_seed(self, b: int) -> int:
        return int(self._seeds[b].integers(2**32))

    def _check_finite(self, lines: TimeLines, view: dict[str, np.ndarray]) -> None:
        """Refuse numbers that are not finite, in rows and what follows them."""
        for path, array in view.items():
            if array.dtype.kind != "f" or math.isfinite(array.sum()) or np.isfinite(array).all():
                continue
            line = int(np.argwhere(~np.isfinite(array))[0][0])
            value = array[line][~np.isfinite(array[line])].flat[0]
            who = self._copies.who(self._slot_of(path, int(lines.slots[line])))
            what = path.removeprefix("last_").removeprefix("final_").removeprefix("central/").split("/")[0]
            mend = "The policy has diverged: lower lr." if what in OF_POLICY else "Mend the environment."
            raise EnvError(f"env={self._env.env_id}: {what}={value} of {who}: expected finite numbers. {mend}")

    def _slot_of(self, path: str, slot: int) -> int:
        """Whose number it is in a row of the agent in a slot: a central critic sees those of others."""
        parts = path.split("/")
        if not (parts[0].endswith("central") and parts[1] == "observations"):
            return slot
        return slot - slot % self._copies.roster.num_slots + int(parts[2])


def episode_of(copies: Copies, cast: Cast, outcome: Outcome, **more: Any) -> Episode:
    """An episode of all agents of a copy.

    Args:
        copies: of the environment.
        cast: who acted in it.
        outcome: of the episode.
        **more: further fields.
    """
    returns = returns_by_name(copies.roster, outcome.returns)
    total = math.fsum(outcome.returns.values())
    policies, by_policy = cast.policies_of(outcome.copy), cast.returns_of(outcome.copy, outcome.returns)
    info, length = outcome.info, outcome.length
    return Episode(total, length, info, returns=returns, policies=policies, by_policy=by_policy, **more)
