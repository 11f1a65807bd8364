"""Where batches come from."""

from lit_rl.datamodules.rollout import RolloutDataModule

__all__ = ["RolloutDataModule"]
