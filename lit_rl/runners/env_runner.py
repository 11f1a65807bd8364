"""Steps one vectorised environment with a policy. A plain class: Ray makes an actor of it, or nobody does."""

import contextlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode

from lit_rl.envs.async_vector import close
from lit_rl.envs.make import EnvConfig, autoreset_mode
from lit_rl.envs.vector import Begin, SyncVectorEnv
from lit_rl.errors import EnvError, EnvFailure, env_error
from lit_rl.policy import Policy
from lit_rl.runners.faults import FaultTolerance, Phase, Watchdog
from lit_rl.runners.finite import check_finite
from lit_rl.runners.fragment import Episode, Epsilons, Fragment, FragmentLayout, put, write_step
from lit_rl.runners.history import ActionHistory
from lit_rl.runners.ledger import Entry
from lit_rl.runners.stepping import check_obs, check_spaces, final_obs, read_info, reset, scale_rewards, step
from lit_rl.runners.survival import Survival
from lit_rl.trees import Tree, iterate, leaves, map_tree, nest


class EnvRunner:
    """Collects fragments [B, T] from `num_envs` environments, T a multiple of `rollout_length`.

    An environment that raises is rebuilt alone, with a seed of its own; the others' episodes go on. Its episode ends by
    truncation before the step that failed, whose row is masked. (With vectorization "async" or "native" all are
    rebuilt, and the fragment is begun anew.)

    Args:
        env: how to make the environments.
        policy: what acts; the runner's own copy, on the CPU.
        num_envs: B.
        rollout_length: the least T, env steps per environment and fragment.
        seed: of the environments' first resets and of the actions.
        info_metrics: keys of `info` to report for each episode.
        keep_states: keep the state before every step, [B, T, ...], instead of the first alone.
        faults: how many failures of environments are survived.
        watchdog: what is told of every phase.
        replayable: keep what `get_state` needs of the episodes under way.
        reward_scale: rewards of fragments are multiplied by it, those of episodes' returns are not.
        reward_clip: rewards of fragments, as scaled, are clipped to plus or minus this; None leaves them.
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
        replayable: bool = False,
        reward_scale: float = 1.0,
        reward_clip: float | None = None,
    ):
        self.policy = policy.eval()
        self.policy_version = 0
        self._epsilons: list[Any] = [0.0] * rollout_length  # of each env step of the next fragment
        self._env = env
        self._num_envs = num_envs
        self._rollout_length = rollout_length
        self._info_metrics = tuple(info_metrics)
        self._watchdog = watchdog or Watchdog()
        self._survival = Survival(faults, self._watchdog)
        self._replayable = replayable
        self._reward_scale, self._reward_clip = reward_scale, reward_clip
        self._keep_states = keep_states and policy.has_memory
        self._accounted = 0  # env steps in fragments so far
        self._discarded: Counter[str] = Counter()  # env steps since, that are in no fragment
        self._unproven: set[int] = set()  # environments that were rebuilt and did not make a step since
        env_seed, action_seed = seed.spawn(2)
        self._seeds = env_seed.spawn(num_envs)
        policy.rng = np.random.default_rng(action_seed)
        self._envs: Any = None
        self._obs: Tree
        self._state: Tree
        self._is_init: np.ndarray
        self._resetting: np.ndarray
        self._returns: np.ndarray
        self._lengths: np.ndarray
        self._begun = np.zeros(num_envs, np.int64)  # episodes of each environment so far
        try:
            self._make_envs([_number(child) for child in self._seeds])
        except EnvFailure as error:
            self._rebuild_all(error)
        self._layout = FragmentLayout(
            policy.spec,
            num_envs,
            state=self._state,
            keep_states=self._keep_states,
            has_mask=self._mode is AutoresetMode.NEXT_STEP,
        )
        can_replay = self._replayable and isinstance(self._envs, SyncVectorEnv)
        self._history = ActionHistory(num_envs) if can_replay else None

    @property
    def executed(self) -> int:
        """Env steps so far."""
        return self._watchdog.executed

    def set_version(self, version: int, epsilons: Epsilons = (0.0,)) -> None:
        """Say what the next fragments are collected with.

        Args:
            version: of the policy's weights, which are now these.
            epsilons: probabilities of random actions, one for each `rollout_length` env steps: a fragment has as many
                times that length.
        """
        self.policy.see_weights()
        self.policy_version = version
        self._epsilons = [epsilon for epsilon in epsilons for _ in range(self._rollout_length)]

    def sample(self) -> Fragment:
        """Step every environment `rollout_length` times for each of `epsilons`.

        Raises:
            EnvError: if environments raise more often than is survived, or give a reward or an observation that is not
                finite.
        """
        while True:
            try:
                return self._collect()
            except EnvFailure as error:
                if isinstance(self._envs, SyncVectorEnv):  # rebuilds one itself: then there is no hope
                    raise
                self._rebuild_all(error)
            finally:
                self._watchdog.enter(Phase.IDLE)

    def _collect(self) -> Fragment:
        length, policy, envs = len(self._epsilons), self.policy, self._envs
        rows = self._layout.allocate(length)
        view = rows.views()
        columns = nest(view)
        obs_rows, action_rows = columns["observation"], columns["action"]
        log_prob_rows, reward_rows = view["action_log_prob"], view["reward"]
        terminated_rows, truncated_rows = view["terminated"], view["truncated"]
        is_init_rows, mask_rows = view["is_init"], view.get("mask")
        finals: list[tuple[int, int, Tree]] = []
        episodes: list[Episode] = []
        failed: list[tuple[int, int]] = []
        watchdog, sync = self._watchdog, isinstance(envs, SyncVectorEnv)
        begun, lengths = self._begun.copy(), self._lengths.copy()
        obs, state = self._obs, self._state
        if state is not None and not self._keep_states:
            map_tree(np.copyto, columns["state"], state)
        for t, epsilon in enumerate(self._epsilons):
            if policy.epsilon != epsilon:  # to set it takes longer
                policy.epsilon = epsilon
            if state is not None and np.count_nonzero(self._is_init):
                state = policy.reset_state(state, self._is_init)
            if self._keep_states:
                write_step(columns["state"], t, state)
            check_obs(policy, obs, self._lengths, self._resetting)
            action, log_prob, state = policy.sample(obs, state)
            write_step(obs_rows, t, obs)
            write_step(action_rows, t, action)
            log_prob_rows[:, t] = log_prob
            is_init_rows[:, t] = self._is_init
            watchdog.enter(Phase.STEP)
            next_obs, reward, terminated, truncated, info = step(envs, self._env, policy.to_env(action))
            next_obs = policy.as_rows(next_obs)
            reward_rows[:, t] = reward
            terminated_rows[:, t] = terminated
            truncated_rows[:, t] = truncated
            self._returns += reward
            self._lengths += 1
            watchdog.executed += self._num_envs if mask_rows is None else int((~self._resetting).sum())
            done = terminated | truncated
            self._is_init = done
            if mask_rows is not None:
                self._after_next_step(t, done, mask_rows, reward_rows)
            elif sync and envs.failed:
                self._after_failure(t, envs.failed, view)
                failed += [(b, t) for b in envs.failed]
            if self._unproven:
                self._unproven = self._unproven.intersection(envs.failed) if sync else set()
            if np.count_nonzero(done):  # several times as fast as `any`
                ended = np.flatnonzero(done)
                episodes += self._finish(ended, info)
                if mask_rows is None:
                    next_obs = self._after_episode_end(t, ended, done, next_obs, info, finals)
            obs = next_obs
        self._obs, self._state = obs, state
        self._begun += is_init_rows.sum(1)
        map_tree(np.copyto, columns["last_observation"], obs)
        packed_finals = self._layout.pack_finals(finals, failed, length)
        finals_view = packed_finals.views() if finals or failed else {}
        check_finite(self._env.env_id, view | finals_view, begun, lengths, self._is_init)
        own_reward = None
        if self._reward_scale != 1.0 or self._reward_clip is not None:
            own_reward = reward_rows.copy()
            scale_rewards(reward_rows, self._reward_scale, self._reward_clip)
        if self._history is not None:
            self._history.add(view, self._is_init, self._lengths)
        delivered = view["reward"].size - len(failed) if mask_rows is None else int(mask_rows.sum())
        entry = Entry(self._accounted, watchdog.executed, delivered, dict(self._discarded))
        fragment = Fragment(
            rows,
            packed_finals,
            episodes,
            self.policy_version,
            entry,
            tuple(self._survival.failures),
            reward=own_reward,
        )
        self._accounted = watchdog.executed
        self._discarded.clear()
        self._survival.failures.clear()
        return fragment

    def close(self) -> None:
        close(self._envs)

    def get_state(self) -> dict[str, Any]:
        """The action noise's generator and, if `replayable`, the episodes under way, as plain data and tensors."""
        state: dict[str, Any] = {"action_rng": self.policy.rng.bit_generator.state}
        if self._history is None:
            return state
        arrays = dict(iterate(self._obs, "observation"))
        if self._state is not None:
            arrays |= iterate(self._state, "state")
        arrays |= {"is_init": self._is_init, "return": self._returns, "length": self._lengths}
        state["arrays"] = {path: torch.from_numpy(np.array(array)) for path, array in arrays.items()}
        state["begins"] = [list(begin) for begin in self._envs.begins]
        state["actions"] = self._history.state()
        return state

    def set_state(self, state: dict[str, Any]) -> int:
        """Go on from what `get_state` returned; returns how many episodes could not, and start afresh.

        Each environment is reset as it was when its episode began, and given the episode's actions again. If it then
        observes what it did, it goes on.
        """
        self.policy.rng.bit_generator.state = state["action_rng"]
        arrays = {path: tensor.numpy() for path, tensor in state.get("arrays", {}).items()}
        if self._history is None or len(arrays.get("length", ())) != self._num_envs:
            return self._num_envs
        saved = nest(arrays)
        restarted = 0
        for b, (begin, actions) in enumerate(zip(state["begins"], state["actions"])):
            goes_on = actions is not None and self._begin_again(b, Begin(*begin), actions, saved["observation"])
            if not goes_on:
                obs = self.policy.as_rows(self._envs.new_episode(b, _number(self._seeds[b].spawn(1)[0])))
                map_tree(lambda rows, x, b=b: put(rows, b, x), self._obs, obs)
                restarted += 1
                continue
            map_tree(lambda rows, x, b=b: put(rows, b, x[b]), self._obs, saved["observation"])
            if self._state is not None:
                map_tree(lambda rows, x, b=b: put(rows, b, x[b]), self._state, saved["state"])
            self._is_init[b], self._returns[b], self._lengths[b] = (
                saved[k][b] for k in ("is_init", "return", "length")
            )
            self._history.load(b, actions)
        return restarted

    def _begin_again(self, b: int, begin: Begin, actions: dict[str, torch.Tensor], saved: Tree) -> bool:
        """Whether environment b is where an episode was after some actions."""
        policy = self.policy
        taken = nest({path: tensor.numpy() for path, tensor in actions.items()})
        given = policy.to_env(taken["action"]) if taken else None
        try:
            obs = self._envs.begin_again(b, begin, given)
        except EnvError:  # whatever it raised: it does not go on from there
            return False
        return all(np.array_equal(x, y[b]) for x, y in zip(leaves(policy.as_rows(obs)), leaves(saved)))

    def _make_envs(self, seeds: list[int]) -> None:
        """Environments at their first observations."""
        num_envs, policy = self._num_envs, self.policy
        self._watchdog.enter(Phase.INIT)
        self._envs = self._env.make_vector(num_envs, info_keys=self._info_metrics)
        self._mode = autoreset_mode(self._envs)
        check_spaces(self._envs, policy)
        if isinstance(self._envs, SyncVectorEnv):
            self._envs.recover = self._recover
            self._envs.remembers = self._replayable
            if self._watchdog.is_on:
                self._envs.on_reset = self._watchdog.enter_reset
        self._watchdog.enter(Phase.RESET)
        self._obs = policy.as_rows(reset(self._envs, self._env, seeds)[0])
        self._watchdog.enter(Phase.IDLE)
        self._is_init = np.ones(num_envs, np.bool_)
        self._resetting = np.zeros(num_envs, np.bool_)  # NEXT_STEP: envs whose next step is a reset, not a transition
        self._state = policy.initial_state(num_envs)
        self._returns = np.zeros(num_envs)
        self._lengths = np.zeros(num_envs, np.int64)

    def _recover(self, b: int, what: str, error: Exception) -> int:
        """Environment b raised: the seed of the one in its place."""
        if b not in self._unproven:
            self._survival.went_well()
        self._unproven.add(b)
        self._survival.survive(env_error(self._env.env_id, f"raised in {what}", error), f"Environment {b} is")
        self._watchdog.enter(Phase.INIT)
        return _number(self._seeds[b].spawn(1)[0])

    def _rebuild_all(self, error: EnvFailure) -> None:
        """Begin again with new environments; the fragment so far is discarded."""
        if not self._unproven:
            self._survival.went_well()
        self._unproven = set(range(self._num_envs))
        while True:
            self._survival.survive(error, f"All {self._num_envs} environments are")
            lost = self._watchdog.executed - self._accounted - self._discarded.total()
            if lost:
                self._discarded["env_error"] += lost
            self._watchdog.enter(Phase.INIT)  # closing may take for ever, too
            if self._envs is not None:
                with contextlib.suppress(Exception):  # what failed may fail to close
                    close(self._envs)
            try:
                self._make_envs([_number(child.spawn(1)[0]) for child in self._seeds])
                return
            except EnvFailure as again:
                error = again

    def _after_next_step(self, t: int, done: np.ndarray, mask_rows: np.ndarray, reward_rows: np.ndarray) -> None:
        """NEXT_STEP: the step after an episode's end ignored its action and returned the next episode's first obs."""
        was_reset = self._resetting
        mask_rows[:, t] = ~was_reset
        if was_reset.any():
            reward_rows[was_reset, t] = 0.0
            self._returns[was_reset] = 0.0
            self._lengths[was_reset] = 0
        self._is_init = was_reset
        self._resetting = done

    def _after_failure(self, t: int, failed: list[int], view: dict[str, np.ndarray]) -> None:
        """SAME_STEP: of these environments the step was none. Their episodes end by truncation before it."""
        self._is_init = self._is_init.copy()  # it is what says which episodes ended
        for b in failed:
            if t and self._lengths[b] > 1:
                view["truncated"][b, t - 1] = True
            view["is_init"][b, t] = False
            self._is_init[b], self._returns[b], self._lengths[b] = True, 0.0, 0
        self._discarded["env_error"] += len(failed)

    def _after_episode_end(
        self,
        t: int,
        ended: np.ndarray,
        done: np.ndarray,
        next_obs: Tree,
        info: dict[str, Any],
        finals: list[tuple[int, int, Tree]],
    ) -> Tree:
        """SAME_STEP and DISABLED: keep the true final observations; `next_obs` becomes the next episodes' first."""
        if self._mode is AutoresetMode.DISABLED:
            finals += [(b, t, map_tree(lambda x, b=b: x[b].copy(), next_obs)) for b in ended]
            reset_obs, _ = reset(self._envs, self._env, None, done)
            return self.policy.as_rows(reset_obs)
        finals += [(b, t, map_tree(np.array, final_obs(self.policy, info, b))) for b in ended]
        return next_obs

    def _finish(self, ended: np.ndarray, info: dict[str, Any]) -> list[Episode]:
        last_info = info.get("final_info", info) if self._mode is AutoresetMode.SAME_STEP else info
        episodes = [
            Episode(float(self._returns[b]), int(self._lengths[b]), read_info(last_info, self._info_metrics, b))
            for b in ended
        ]
        self._returns[ended] = 0.0
        self._lengths[ended] = 0
        return episodes


def _number(seed: np.random.SeedSequence) -> int:
    return int(seed.generate_state(1)[0])
