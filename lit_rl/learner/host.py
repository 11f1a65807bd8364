"""What an algorithm needs of its surroundings."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lit_rl.files import rescue
from lit_rl.learner.clipping import Clipping
from lit_rl.learner.compiled import CompiledStep
from lit_rl.learner.direct import way_of_steps
from lit_rl.learner.steps import GradientSteps
from lit_rl.source import Source


@dataclass(frozen=True)
class Host:
    """What an algorithm needs of its surroundings while it learns, be it the Trainer's module or a part of it.

    Attributes:
        steps: takes its gradient steps.
        source: where its batches come from.
        is_resumed: whether the run goes on from a checkpoint, instead of counting from 0.
        rank: of this process, from 0.
        save_checkpoint: writes a checkpoint of the run under a name, and returns its path; every rank calls it.
        log_folder: where the run's files are; every rank calls it.
        policy_id: of the algorithm among those that take their steps together; None if it takes them by itself.
    """

    steps: GradientSteps
    source: Source
    is_resumed: bool
    rank: int
    save_checkpoint: Callable[[str], Path]
    log_folder: Callable[[], Path]
    policy_id: str | None = None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizers' groups of parameters whose learning rate is the algorithm's."""
        groups = [group for optimizer in self.steps.optimizers for group in optimizer.param_groups]
        return [group for group in groups if group.get("policy_id") == self.policy_id]

    def within(self, source: Source, policy_id: str | None = None) -> "Host":
        """The same surroundings, with another source: for an algorithm that others are part of, or take steps with."""
        return replace(self, source=source, policy_id=policy_id)


def make_host(
    algorithm: Any,
    module: L.LightningModule,
    optimizers: Sequence[LightningOptimizer],
    source: Source,
    names: Mapping[nn.Parameter, str] | None = None,
) -> Host:
    """The host of an algorithm in a fit that begins.

    Args:
        algorithm: with its networks.
        module: the Trainer's, whose manual optimisation takes the steps: the algorithm itself, or what it is a part of.
        optimizers: Lightning's wrappers of what the algorithm's `configure_optimizers` returned.
        source: of its batches.
        names: of the parameters that are stepped; None takes the algorithm's.

    Raises:
        OptionError: if its steps are to be compiled and cannot be.
    """
    trainer = module.trainer
    clipping = Clipping(algorithm.hp.max_grad_norm, algorithm.hp.grad_clip_by)
    backward, step = way_of_steps(module)
    steps = GradientSteps(
        optimizers,
        backward,
        step,
        names or {parameter: name for name, parameter in algorithm.named_parameters()},
        clipping,
        no_sync=trainer.model.no_sync if isinstance(trainer.model, DistributedDataParallel) else nullcontext,
        compiled=CompiledStep(algorithm, optimizers[0], clipping) if algorithm.hp.get("compile") else None,
    )
    return Host(
        steps=steps,
        source=source,
        is_resumed=trainer.global_step > 0 or bool(trainer.ckpt_path),
        rank=module.global_rank,
        save_checkpoint=lambda name: rescue.save_checkpoint(trainer, name),
        log_folder=lambda: rescue.log_folder(trainer),
    )
