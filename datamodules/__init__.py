"""Where batches come from."""

from lit_rl.datamodules.replay import ReplayDataModule
from lit_rl.datamodules.rollout import RolloutDataModule

__all__ = ["ReplayDataModule", "RolloutDataModule"]
