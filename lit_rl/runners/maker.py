"""What makes env runners, in this process or in others, and has them act by other policies later."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lit_rl.envs.make import EnvConfig
from lit_rl.policy import Policy
from lit_rl.runners.env_runner import EnvRunner
from lit_rl.runners.faults import FaultTolerance, Watchdog
from lit_rl.runners.multi_agent_runner import MultiAgentEnvRunner

# What runners are seeded for: a number of the SeedSequence's spawn key.
COLLECTING, NEW_POLICIES = 0, 1


@dataclass(frozen=True)
class RunnerMaker:
    """Makes the env runners of a learner process.

    Attributes:
        env: how to make the environments.
        is_multi_agent: whether they have several agents.
        make_policy: makes a policy of the learner's structure, in the runner's process.
        num_envs: environments of each runner.
        seed: of all ranks' runners. A runner's own depends on its number among all of them, so that 2 ranks with a
            runner each collect what 1 rank with 2 does, and on what was collected before the run was resumed.
        rank: of this learner process.
        world_size: how many there are.
        collected: times fragments came since the run began.
        rollout_length, faults, info_metrics, keep_states, replayable, reward_scale, reward_clip: see `EnvRunner`.
    """

    env: EnvConfig
    make_policy: Callable[[], Policy]
    num_envs: int
    rollout_length: int
    seed: np.random.SeedSequence
    rank: int
    world_size: int
    collected: int
    faults: FaultTolerance
    info_metrics: Sequence[str]
    keep_states: bool | Collection[str]
    is_multi_agent: bool
    replayable: bool
    reward_scale: float
    reward_clip: float | None

    def __call__(self, runner: int, incarnation: int, watchdog: Watchdog) -> EnvRunner | MultiAgentEnvRunner:
        """A new runner. An incarnation has a seed of its own."""
        options: dict[str, Any] = {
            "num_envs": self.num_envs,
            "rollout_length": self.rollout_length,
            "seed": self._seed(COLLECTING, runner, incarnation, self.collected),
            "info_metrics": self.info_metrics,
            "keep_states": self.keep_states,
            "faults": self.faults,
            "watchdog": watchdog,
            "replayable": self.replayable,
            "reward_scale": self.reward_scale,
            "reward_clip": self.reward_clip,
        }
        if self.is_multi_agent:
            new_seed = self._seed(NEW_POLICIES, runner)
            return MultiAgentEnvRunner(self.env, self.make_policy(), new_seed=new_seed, **options)
        return EnvRunner(self.env, self.make_policy(), **options)

    def with_policies(self, make_policy: Callable[[], Policy], keep_states: bool | Collection[str]) -> "RunnerMaker":
        """The same, of runners that act by other policies."""
        return replace(self, make_policy=make_policy, keep_states=keep_states)

    def update(self, runner: Any) -> None:
        """Have a runner that was made with other policies act by those of this maker from its next fragment on."""
        runner.follow(self.make_policy(), self.keep_states)

    def _seed(self, purpose: int, runner: int, *key: int) -> np.random.SeedSequence:
        spawn_key = (*self.seed.spawn_key, purpose, runner * self.world_size + self.rank, *key)
        return np.random.SeedSequence(self.seed.entropy, spawn_key=spawn_key)
