"""On-policy rollouts."""

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
from tensordict import TensorDict

from lit_rl import distributed
from lit_rl.checks import check_count
from lit_rl.datamodules.environments import EnvDataModule
from lit_rl.datamodules.loaders import RolloutLoader
from lit_rl.envs.make import Wrapper
from lit_rl.errors import OptionError
from lit_rl.off_policy import OffPolicy
from lit_rl.rollout import to_rollout
from lit_rl.runners.faults import FaultTolerance
from lit_rl.runners.pool import Placement


class RolloutDataModule(EnvDataModule):
    """Rollouts [B, T] collected with the policy that is being trained, for on-policy algorithms.

    Args:
        env: a gymnasium id, `"package.module:Class"`, or a callable that returns an environment.
        env_kwargs: passed on to the environment.
        wrappers: applied in order; each a callable, `"package.module:Class"`, or `{"package.module:Class": kwargs}`.
        vectorization: "sync" (one after the other), "async" (a process for each), or "native" (the environment's own).
        num_env_runners: Ray actors that step environments, per learner process; 0 steps them in the learner process.
        num_envs_per_env_runner: environments in each runner.
        rollout_length: T, env steps per environment and rollout.
        max_env_steps: the budget, summed over learner processes; never exceeded. None: the Trainer's limits alone.
        rollouts_per_epoch: batches in a Lightning epoch: how often evaluation and checkpoints can happen.
        prefetch: 0 collects every rollout with the newest weights; 1 collects the next one while the learner updates,
            with weights one version behind (needs num_env_runners >= 1).
        reward_scale: rewards are multiplied by it before the learner sees them. Returns that are logged stay the
            environment's own.
        reward_clip: rewards, as scaled, are clipped to plus or minus this before the learner sees them; None leaves
            them.
        eval_episodes: whole episodes that `validate` plays, each with the same seed every time.
        eval_deterministic: whether evaluation takes the most probable action.
        eval_timeout_s: seconds after which an evaluation ends with the episodes it has.
        eval_env_kwargs: for evaluation these are passed to the environment too, in place of `env_kwargs` of that name.
        num_eval_env_runners: Ray actors that play the evaluation's episodes, per learner process; 0 plays them in the
            learner process.
        eval_parallel: go on training while the eval runners play. Each evaluation is then logged when the next one is
            due, and the last one at the end (needs num_eval_env_runners >= 1).
        return_window: finished episodes over which `rollout/return_mean` and its like are averaged.
        info_metrics: keys of the environment's `info` to log, read at each episode's last step.
        seed: of everything random here. None: the resumed run's, or what `seed_everything` set, or a random one.
        ray_address: of a running Ray to join; None starts one on this machine (or takes RAY_ADDRESS).
        placement: what Ray reserves for an env runner, and where it puts it.
        fault_tolerance: which failures of env runners and environments are survived, and how often.
        torch_threads: of the learner process; None takes 1 for a small network, else what the runners leave.
    """

    def __init__(
        self,
        env: str | Callable[..., gym.Env],
        *,
        env_kwargs: dict[str, Any] | None = None,
        wrappers: Sequence[Wrapper] = (),
        vectorization: str = "sync",
        num_env_runners: int = 0,
        num_envs_per_env_runner: int = 8,
        rollout_length: int = 128,
        max_env_steps: int | None = None,
        rollouts_per_epoch: int = 10,
        prefetch: int = 0,
        reward_scale: float = 1.0,
        reward_clip: float | None = None,
        eval_episodes: int = 10,
        eval_deterministic: bool = True,
        eval_timeout_s: float = 1800.0,
        eval_env_kwargs: dict[str, Any] | None = None,
        num_eval_env_runners: int = 0,
        eval_parallel: bool = False,
        return_window: int = 100,
        info_metrics: Sequence[str] = (),
        seed: int | None = None,
        ray_address: str | None = None,
        placement: Placement | None = None,
        fault_tolerance: FaultTolerance | None = None,
        torch_threads: int | None = None,
    ):
        super().__init__(
            env,
            env_kwargs=env_kwargs,
            wrappers=wrappers,
            vectorization=vectorization,
            num_env_runners=num_env_runners,
            num_envs_per_env_runner=num_envs_per_env_runner,
            rollout_length=rollout_length,
            max_env_steps=max_env_steps,
            prefetch=prefetch,
            reward_scale=reward_scale,
            reward_clip=reward_clip,
            eval_episodes=eval_episodes,
            eval_deterministic=eval_deterministic,
            eval_timeout_s=eval_timeout_s,
            eval_env_kwargs=eval_env_kwargs,
            num_eval_env_runners=num_eval_env_runners,
            eval_parallel=eval_parallel,
            return_window=return_window,
            info_metrics=info_metrics,
            seed=seed,
            ray_address=ray_address,
            placement=placement,
            fault_tolerance=fault_tolerance,
            torch_threads=torch_threads,
        )
        self.rollouts_per_epoch = check_count("rollouts_per_epoch", rollouts_per_epoch)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and isinstance(self.algorithm, OffPolicy):
            raise OptionError(
                f"model={type(self.algorithm).__name__}: RolloutDataModule feeds on-policy algorithms such as PPO. Use "
                "ReplayDataModule."
            )

    def train_dataloader(self) -> RolloutLoader:
        self.set_threads()
        self.say_if_done()
        return RolloutLoader(self)

    def start_rollout(self) -> None:
        """Have the runners begin to collect, with the weights the policy has now."""
        self.start_runners()

    def finish_rollout(self) -> TensorDict:
        """The rollout that was begun."""
        assert self._pool is not None
        fragments = distributed.together(self._pool.finish, self.algorithm.device)
        self.took(fragments)
        return to_rollout([fragment for _, fragment in fragments], copy=bool(self.num_env_runners))

    def rollouts_left(self, env_steps: int) -> int:
        """How many whole rollouts the budget still has room for."""
        left = self._budget_left(env_steps)
        return int(left // self._max_rows) if left != float("inf") else 2**31

    @property
    def _rows_per_epoch(self) -> int:
        return self.rollouts_per_epoch * self._max_rows
