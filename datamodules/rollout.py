"""On-policy rollouts."""

import time
from collections.abc import Iterator
from typing import Any

from lit_rl import distributed
from lit_rl.datamodules.environments import EnvDataModule
from lit_rl.envs.make import Env
from lit_rl.errors import OptionError
from lit_rl.off_policy import OffPolicy
from lit_rl.options import Count
from lit_rl.rollout import Rollout
from lit_rl.runners.gathering import evened, to_rollout


class RolloutDataModule(EnvDataModule):
    """Rollouts [B, T] collected with the policy that is being trained, for on-policy algorithms.

    Args:
        rollouts_per_epoch: batches in a Lightning epoch: how often evaluation and checkpoints can happen.
    """

    rollouts_per_epoch: int

    def __init__(self, env: Env, *, rollouts_per_epoch: Count = 10, **options: Any):
        super().__init__(env, **options)
        self.take_options()

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and isinstance(self.algorithm, OffPolicy):
            raise OptionError(
                f"model={type(self.algorithm).__name__}: RolloutDataModule feeds on-policy algorithms such as PPO. Use "
                "ReplayDataModule."
            )

    def train_dataloader(self) -> "RolloutLoader":
        self.set_threads()
        self.say_if_done()
        return RolloutLoader(self)

    def start_rollout(self) -> None:
        """Have the runners begin to collect, with the weights the policy has now."""
        self.start_runners()

    def finish_rollout(self) -> Rollout:
        """The rollout that was begun, this rank's."""
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


class RolloutLoader:
    """A sized, stateful iterable over one epoch's rollouts.

    Sized, because Lightning fetches one batch ahead from an iterable without a length: training would silently be one
    policy behind.
    """

    def __init__(self, data: RolloutDataModule):
        self._data = data
        self._in_flight = False

    def __len__(self) -> int:
        return self._data.rollouts_per_epoch

    def __iter__(self) -> Iterator[Rollout]:
        data = self._data
        algorithm, trainer = data.algorithm, data.attached_trainer
        first = trainer.fit_loop.batch_idx + 1  # not 0 in an epoch that is resumed in its middle
        for _ in range(first, len(self)):
            started = time.perf_counter()
            if not self._in_flight:
                data.start_rollout()
            rollout = evened(data.finish_rollout(), algorithm.device)
            self._in_flight = False
            data.sample_s = time.perf_counter() - started
            left = data.rollouts_left(algorithm.env_steps_done + rollout.env_steps)
            if not left:
                data.stop_at_budget()
            elif data.prefetch:
                data.start_rollout()
                self._in_flight = True
            yield rollout

    def state_dict(self) -> dict[str, Any]:
        """Nothing, since Lightning's batch index says where in the epoch we are; its presence says that we resume."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""
