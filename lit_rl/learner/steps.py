"""Gradient steps: backward, the average over ranks, what is skipped, clipping, and the optimizer's step."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from tensordict import TensorDict
from torch import Tensor, nn

from lit_rl import distributed
from lit_rl.learner.clipping import Clipping, clip_gradients
from lit_rl.learner.compiled import CompiledStep


class GradientSteps:
    """Takes the gradient steps of one algorithm, alone or beside others in the same LightningModule.

    Ranks average the gradients of the parameters that are stepped, in one reduction after backward; DDP's own
    synchronisation is left out (`no_sync`). So losses may leave parameters unused, and algorithms with optimizers of
    their own step one after the other. Where a loss or gradient of any rank is not finite, every rank skips the step.

    Args:
        optimizers: Lightning's wrappers of those the algorithm configured, whose `step` calls Lightning's hooks.
        backward: of a loss, `LightningModule.manual_backward`.
        names: of parameters, for messages.
        clipping: of gradients.
        no_sync: inside of which backward leaves gradients alone.
        compiled: takes the steps on batches, if they are compiled.

    Attributes:
        skipped: steps that were skipped.
        not_finite: what was not finite in the last of them, in words.
        norms: of the gradients of steps that were taken, before clipping; whoever reads them clears them.
    """

    def __init__(
        self,
        optimizers: Sequence[LightningOptimizer],
        backward: Callable[..., None],
        names: Mapping[nn.Parameter, str],
        clipping: Clipping,
        no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext,
        compiled: CompiledStep | None = None,
    ):
        self.optimizers = list(optimizers)
        self.skipped = 0
        self.not_finite = ""
        self.norms: list[Tensor] = []
        self._backward, self._no_sync = backward, no_sync
        self._names = names
        self._clipping = clipping
        self._compiled = compiled
        self._in_a_row: dict[LightningOptimizer, int] = {}

    @property
    def in_a_row(self) -> int:
        """Steps that one of the optimizers skipped since the last one it took."""
        return max(self._in_a_row.values(), default=0)

    @property
    def is_compiled(self) -> bool:
        return self._compiled is not None

    def on_batch(self, batch: TensorDict) -> tuple[bool, Any]:
        """One compiled step on a batch: whether it was taken, and what the loss gave beside its value."""
        assert self._compiled is not None, "steps are eager: see on_loss"
        value, norm, rest = self._compiled(batch)
        return self._note(value, norm, self._compiled.optimizer), rest

    def on_loss(self, loss: Tensor, optimizer: LightningOptimizer | None = None) -> bool:
        """One step on a loss that was computed: whether it was taken.

        Args:
            loss: a scalar, of which backward was not called.
            optimizer: which, if the algorithm has several.
        """
        if optimizer is None:
            assert len(self.optimizers) == 1, "several optimizers: say which one"
            optimizer = self.optimizers[0]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for parameter in parameters:  # optimizer.zero_grad(), which takes longer to prepare for it than to do it
            parameter.grad = None
        # A loss that is not finite gives gradients that are not. Every rank has the average of all gradients, so that
        # they need not ask each other.
        with self._no_sync():
            self._backward(loss, gradient=loss.detach() * 0 + 1)
        distributed.average_gradients(parameters)
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norms = torch._foreach_norm(grads)
        norm = torch.linalg.vector_norm(torch.stack(norms))
        if not self._note(loss, norm, optimizer):
            return False
        if self._clipping.bound is not None:
            clip_gradients(grads, norms, norm, self._clipping.bound, self._clipping.by)
        optimizer.step()
        return True

    def _note(self, loss: Tensor, norm: Tensor, optimizer: LightningOptimizer) -> bool:
        """Whether a step is to be taken: not if the gradient's norm is not finite, which is counted."""
        if math.isfinite(norm):
            self._in_a_row.pop(optimizer, None)
            self.norms.append(norm)
            return True
        self.skipped += 1
        self._in_a_row[optimizer] = self._in_a_row.get(optimizer, 0) + 1
        wrong = (name for p, name in self._names.items() if p.grad is not None and not p.grad.isfinite().all())
        self.not_finite = f"The gradient of {next(wrong, 'all parameters')}" if loss.isfinite() else "The loss"
        return False
