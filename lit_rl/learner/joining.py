"""Optimizers that join a fit under way, or leave it."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.core.optimizer import LightningOptimizer

from lit_rl.errors import OptionError


def wrapped(trainer: Any, optimizers: Any) -> list[LightningOptimizer]:
    """Lightning's wrappers of what an algorithm's `configure_optimizers` returned: an optimizer, or several."""
    found = optimizers if isinstance(optimizers, list | tuple) else [optimizers]
    return [LightningOptimizer._to_lightning_optimizer(optimizer, trainer.strategy) for optimizer in found]


def join(trainer: Any, optimizers: Sequence[LightningOptimizer]) -> None:
    """Have the Trainer know optimizers as it knows those it set up: they come last in checkpoints, and count steps.

    The wrappers of the others stay as they are, since algorithms hold them.
    """
    strategy = trainer.strategy
    strategy._optimizers = [*strategy._optimizers, *(optimizer.optimizer for optimizer in optimizers)]
    strategy._lightning_optimizers = [*strategy._lightning_optimizers, *optimizers]


def leave(trainer: Any, optimizers: Sequence[LightningOptimizer]) -> None:
    """Have the Trainer forget optimizers, and their states with them."""
    strategy, gone = trainer.strategy, {id(optimizer.optimizer) for optimizer in optimizers}
    strategy._optimizers = [each for each in strategy._optimizers if id(each) not in gone]
    strategy._lightning_optimizers = [each for each in strategy._lightning_optimizers if id(each.optimizer) not in gone]


def check_callbacks(trainer: Any, call: str) -> None:
    """Refuse to change policies while a callback keeps copies of their weights.

    Raises:
        OptionError: naming it.
    """
    for callback in trainer.callbacks:
        if isinstance(callback, WeightAveraging):
            raise OptionError(
                f"{call}: {type(callback).__name__} averages the weights that there were when training began. Leave it "
                "out of Trainer(callbacks=...)."
            )
