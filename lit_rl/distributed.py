"""What learner ranks tell each other. Each function is the identity in a single process."""

import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lit_rl.errors import RunnerError

Result = TypeVar("Result")

SPIN_S = 0.02  # how long a rank looks for the others before it sleeps


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce(x: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """`x` reduced over ranks, in place.

    On the CPU a rank looks for the result for a while before it sleeps: to be woken takes about a millisecond in a
    virtual machine, as long as a gradient step of a small network.
    """
    work = dist.all_reduce(x, op=op, async_op=True)
    if x.device.type == "cpu":
        begun = time.perf_counter()
        while not work.is_completed() and time.perf_counter() - begun < SPIN_S:
            os.sched_yield()
    work.wait()
    return x


@torch.no_grad()
def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Replace the gradients of parameters by their averages over ranks, in one reduction.

    A parameter without a gradient on this rank counts 0; if it has none on any rank, it stays without.
    """
    if world_size() == 1:
        return
    there = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = rank_mean(torch.cat([*(grad.flatten() for grad in grads), there]))
    *pieces, there = flat.split([*(p.numel() for p in parameters), len(parameters)])
    for parameter, piece, share in zip(parameters, pieces, there.tolist()):
        parameter.grad = piece.view_as(parameter) if share else None


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum of `x` over ranks, in place."""
    return all_reduce(x) if world_size() > 1 else x


def together(function: Callable[[], Result], device: torch.device) -> Result:
    """What `function` returns. If it raises on one rank, all ranks raise: else the others would wait for ever.

    Raises:
        RunnerError: if it raised on another rank.
    """
    error: Exception | None = None
    try:
        result = function()
    except Exception as raised:
        error = raised
    if greatest([int(error is not None)], device) == [1] and error is None:
        raise RunnerError("Another learner process could not step its environments and ended the run: see its error.")
    if error is not None:
        raise error
    return result


def greatest(numbers: list[int], device: torch.device) -> list[int]:
    """The greatest of all ranks' numbers, each by itself."""
    if world_size() == 1:
        return numbers
    found = torch.tensor(numbers, device=device)
    return all_reduce(found, dist.ReduceOp.MAX).tolist()


def mean_count(mask: Tensor) -> Tensor:
    """How many rows of a mask are real, the average over ranks."""
    return all_reduce_sum(mask.sum(dtype=torch.float32)) / world_size()


def masked_mean(x: Tensor, mask: Tensor | None, count: Tensor | None = None) -> Tensor:
    """Mean of `x` [*N] over its real rows, such that the ranks' average of it is the mean over all ranks' real rows.

    Gradients are averaged over ranks. With a mask, ranks may hold different numbers of real rows, so each divides its
    own sum by the *mean* count over ranks instead of its own. `mask=None` says that every row of every rank is real.

    Args:
        x: [*N].
        mask: [*N].
        count: `mean_count(mask)`, if it is known: ranks then need not ask each other.
    """
    if mask is None:
        return x.mean()
    count = mean_count(mask) if count is None else count
    return torch.where(mask, x, 0.0).sum() / count.clamp(min=1.0 / world_size())  # one real row of all ranks'


def row_means(mask: Tensor | None, *values: Tensor, count: Tensor | None = None) -> Tensor:
    """The mean of each of several values [*N] over this rank's real rows, to be logged.

    With `count`, `mean_count(mask)`, the ranks' average of it is the mean over all ranks' real rows: see `masked_mean`.
    """
    table = torch.stack(values).flatten(1)
    if mask is None:
        return table.mean(1)
    count = mask.sum().clamp(min=1) if count is None else count.clamp(min=1.0 / world_size())
    return torch.where(mask.flatten(), table, 0.0).sum(1) / count


def rank_mean(x: Tensor) -> Tensor:
    """The average of `x` over ranks, in place."""
    return all_reduce_sum(x).div_(world_size())


@torch.no_grad()
def share(tensors: Iterable[Tensor]) -> None:
    """Give every rank the first one's values of tensors, in place."""
    for tensor in tensors if world_size() > 1 else ():
        dist.broadcast(tensor, 0)


def gather_rows(x: Tensor) -> Tensor:
    """The rows [N, ...] of every rank, in the order of the ranks; all have as many."""
    if world_size() == 1:
        return x
    found = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(found, x.contiguous())
    return torch.cat(found)


def gather(value: Result) -> list[Result]:
    """Every rank's `value`, in the order of the ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def standardize(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """`x` shifted and scaled to mean 0 and standard deviation 1 over the real rows of all ranks."""
    if mask is not None:
        x = torch.where(mask, x, 0.0)
    ones = torch.ones_like(x) if mask is None else mask.to(x.dtype)
    total, count = all_reduce_sum(torch.stack([(x * ones).sum(), ones.sum()]))
    centered = x - total / count.clamp(min=1.0)
    square = all_reduce_sum((centered.square() * ones).sum())
    return centered / ((square / (count - 1).clamp(min=1.0)).sqrt() + 1e-8)
