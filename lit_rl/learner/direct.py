"""Gradient steps past Lightning's hooks, where nobody listens to them: they take as long as a small network's step."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import SingleDeviceStrategy

HOOKS = ("on_before_backward", "on_after_backward", "on_before_optimizer_step")
BACKWARD = ("backward", "manual_backward")


def way_of_steps(module: L.LightningModule) -> tuple[Callable[..., None], Callable[[LightningOptimizer], Any]]:
    """How a module's `backward` of a loss and its optimizers' steps are called: results are the same either way.

    Lightning's way, which calls hooks, the precision plugin, the strategy and the profiler, unless none of these does
    anything beside it. The optimizer's own step is then called, and counted in `global_step` as ever.
    """
    if not _nobody_listens(module):
        return module.manual_backward, LightningOptimizer.step
    return torch.Tensor.backward, _step


def _step(optimizer: LightningOptimizer) -> None:
    optimizer._on_before_step()
    optimizer.optimizer.step()
    optimizer._on_after_step()


def _nobody_listens(module: L.LightningModule) -> bool:
    trainer: Any = module.trainer
    callbacks = trainer.callbacks
    return (
        type(trainer.strategy) is SingleDeviceStrategy
        and type(trainer.precision_plugin) is Precision
        and type(trainer.profiler) is PassThroughProfiler
        and not any(_overrides(module, L.LightningModule, name) for name in HOOKS + BACKWARD)
        and not any(_overrides(callback, L.Callback, name) for callback in callbacks for name in HOOKS)
    )


def _overrides(listener: Any, base: type, name: str) -> bool:
    """Whether a method is not the base class's: the class overrides it, or the object has one of its own."""
    return getattr(getattr(listener, name), "__func__", None) is not getattr(base, name)
