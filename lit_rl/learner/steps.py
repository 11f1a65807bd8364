"""Gradient steps: backward, the average over ranks, what is skipped, clipping, and the optimizer's step."""

import math
from collections import deque
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

DEFERRED_ON = ("cuda",)  # kinds of devices that are not waited for at every step
MOST_UNREAD = 16  # steps there that nobody knows the outcome of: the batches they were taken on are kept as long


class GradientSteps:
    """Takes the gradient steps of one algorithm, alone or beside others in the same LightningModule.

    Ranks average the gradients of the parameters that are stepped, in one reduction after backward; DDP's own
    synchronisation is left out (`no_sync`). So losses may leave parameters unused, and algorithms with optimizers of
    their own step one after the other. Where a loss or gradient of any rank is not finite, every rank skips the step.

    On a CPU the outcome of a step is known at once. A GPU decides by itself, so that nobody waits for it at every step:
    `fetch` asks it for the outcomes of all steps since, and `count` counts them. Lightning's `global_step` then counts
    the skipped steps too. An optimizer that cannot decide on the device (torch's fused ones can) is waited for.

    Args:
        optimizers: Lightning's wrappers of those the algorithm configured.
        backward: of a loss, as `LightningModule.manual_backward` does it.
        step: of one of the optimizers, as its own `step` does it.
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
        step: Callable[[LightningOptimizer], Any],
        names: Mapping[nn.Parameter, str],
        clipping: Clipping,
        no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext,
        compiled: CompiledStep | None = None,
    ):
        self.optimizers = list(optimizers)
        self.skipped = 0
        self.not_finite = ""
        self.norms: list[Tensor] = []
        self._backward, self._step, self._no_sync = backward, step, no_sync
        self._names = names
        self._clipping = clipping
        self._compiled = compiled
        self._in_a_row: dict[LightningOptimizer, int] = {}
        self._unread: list[tuple[LightningOptimizer, Tensor, Tensor]] = []  # steps: the loss, and its gradient's norm
        self._fetched: deque[tuple[LightningOptimizer, Tensor, bool, bool]] = deque()

    @property
    def num_unread(self) -> int:
        """Steps whose outcome only the device knows."""
        return len(self._unread)

    def fetch(self) -> None:
        """Ask the device for the outcomes of the steps that were not read, all at once."""
        if self._unread:
            table = torch.stack([torch.stack([loss, norm]) for _, loss, norm in self._unread]).isfinite().tolist()
            for (optimizer, _, norm), (loss_finite, taken) in zip(self._unread, table):
                self._fetched.append((optimizer, norm, loss_finite, taken))
            self._unread.clear()

    def count(self, num: int) -> int:
        """Count the outcomes of the oldest `num` steps that were fetched; returns how many were skipped."""
        before = self.skipped
        for _ in range(num):
            optimizer, norm, loss_finite, taken = self._fetched.popleft()
            self._count(optimizer, norm, taken, "The gradient" if loss_finite else "The loss")
        return self.skipped - before

    @property
    def in_a_row(self) -> int:
        """Steps that one of the optimizers skipped since the last one it took."""
        return max(self._in_a_row.values(), default=0)

    @property
    def is_compiled(self) -> bool:
        return self._compiled is not None

    def on_batch(self, batch: TensorDict) -> tuple[bool | Tensor, Any]:
        """One compiled step on a batch: whether it was taken, and what the loss gave beside its value."""
        assert self._compiled is not None, "steps are eager: see on_loss"
        optimizer = self._compiled.optimizer
        value, norm, rest = self._compiled(batch)
        taken = self._note(value, norm, optimizer, self._compiled.device)
        if taken is not False:
            optimizer._on_before_step()
            optimizer._on_after_step()
        return taken, rest

    def on_loss(self, loss: Tensor, optimizer: LightningOptimizer | None = None) -> bool | Tensor:
        """One step on a loss that was computed: whether it was taken, a tensor where only the device knows.

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
        inner: Any = optimizer.optimizer
        decides = getattr(inner, "_step_supports_amp_scaling", False)  # so torch names it: it takes a `found_inf`
        taken = self._note(loss.detach(), norm, optimizer, norm.device if decides else torch.device("cpu"))
        if taken is False:
            return False
        if self._clipping.bound is not None:
            clip_gradients(grads, norms, norm, self._clipping.bound, self._clipping.by)
        if taken is True:
            self._step(optimizer)
            return True
        inner.found_inf = (~taken).float()
        self._step(optimizer)
        del inner.found_inf
        return taken

    def _note(self, loss: Tensor, norm: Tensor, optimizer: LightningOptimizer, device: torch.device) -> bool | Tensor:
        """Whether a step is taken: not if the gradient's norm is not finite, which `device` decides."""
        if device.type in DEFERRED_ON:
            self._unread.append((optimizer, loss, norm))
            return norm.isfinite()
        taken, words = math.isfinite(norm), ""
        if not taken:
            wrong = (name for p, name in self._names.items() if p.grad is not None and not p.grad.isfinite().all())
            words = f"The gradient of {next(wrong, 'all parameters')}" if loss.isfinite() else "The loss"
        self._count(optimizer, norm, taken, words)
        return taken

    def _count(self, optimizer: LightningOptimizer, norm: Tensor, taken: bool, words: str) -> None:
        if taken:
            self._in_a_row.pop(optimizer, None)
            self.norms.append(norm)
        else:
            self.skipped += 1
            self._in_a_row[optimizer] = self._in_a_row.get(optimizer, 0) + 1
            self.not_finite = words


def where_taken(taken: Sequence[bool | Tensor], values: Sequence[Tensor]) -> list[Tensor]:
    """The values of steps that were taken, of one value for each step. A device is asked once."""
    known: Sequence[Any] = taken
    if any(isinstance(each, Tensor) for each in taken):
        known = torch.stack([torch.as_tensor(each) for each in taken]).tolist()
    return [value for value, each in zip(values, known) if each]
