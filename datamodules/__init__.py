"""Where batches come from."""

from lit_rl.datamodules.offline import OfflineDataModule
from lit_rl.datamodules.replay import ReplayDataModule
from lit_rl.datamodules.rollout import RolloutDataModule

__all__ = ["OfflineDataModule", "ReplayDataModule", "RolloutDataModule"]
