"""What is no weight, kept from Lightning's callbacks that average weights."""

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn

from lit_rl.networks import ValueHead


class KeepState(L.Callback):
    """Keeps an algorithm's own buffers as they are, beside a `WeightAveraging` that averages and swaps all of them.

    They are counters (env steps, updates), running moments, scheduled values and constants: the average of none of them
    is any use, and that of whole numbers is rounded down. The statistics of batch norm layers go with the weights they
    were measured for, and are left to `WeightAveraging`. Averages of critics' heads with `normalize_values` are
    rescaled whenever the heads are: else they would be of weights in different units.

    It comes after `WeightAveraging` among the Trainer's callbacks, so each of its hooks mends what the other's did.
    """

    def __init__(self) -> None:
        self._state: dict[str, Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        _keep_in_unit(pl_module, [callback._average_model for callback in _averaging(trainer)])

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._take(pl_module)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._give_back(pl_module)  # both models have it now: swapping them back changes nothing

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._take(pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._give_back(pl_module)
        _keep_in_unit(pl_module, [])

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        weights = checkpoint["state_dict"]  # of the average
        weights.update({name: x.clone() for name, x in own_buffers(pl_module).items() if name in weights})

    def _take(self, module: nn.Module) -> None:
        self._state = {name: buffer.clone() for name, buffer in own_buffers(module).items()}

    @torch.no_grad()
    def _give_back(self, module: nn.Module) -> None:
        for name, buffer in own_buffers(module).items():
            buffer.copy_(self._state[name])


def own_buffers(module: nn.Module) -> dict[str, Tensor]:
    """All buffers by name but the statistics of batch norm layers."""
    norms = [name for name, part in module.named_modules() if isinstance(part, nn.modules.batchnorm._NormBase)]
    return {name: x for name, x in module.named_buffers() if name.rpartition(".")[0] not in norms}


def keepers(trainer: L.Trainer) -> list[L.Callback]:
    """The callbacks that an algorithm needs beside those of the Trainer."""
    return [KeepState()] if _averaging(trainer) else []


def _averaging(trainer: Any) -> list[WeightAveraging]:
    return [callback for callback in trainer.callbacks if isinstance(callback, WeightAveraging)]


def _keep_in_unit(module: nn.Module, averages: Sequence[Any]) -> None:
    """Have the averages of a module's heads rescaled as the heads are, from now on."""
    for name, head in module.named_modules():
        if isinstance(head, ValueHead):
            head.keep_in_unit([average.module.get_submodule(name) for average in averages])
