"""What learner ranks tell each other. Each function is the identity in a single process."""

from enum import IntEnum

import torch
import torch.distributed as dist
from torch import Tensor


class Vote(IntEnum):
    """What a rank can do with the next batch. All ranks do what the greatest vote says, so that none waits alone."""

    DATA = 0
    STOP = 1


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum of `x` over ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def vote(choice: Vote, device: torch.device) -> Vote:
    """The greatest of all ranks' votes."""
    return Vote(all_reduce_max(choice, device))


def all_reduce_max(number: int, device: torch.device) -> int:
    """The greatest of all ranks' numbers."""
    if world_size() == 1:
        return number
    numbers = torch.tensor(int(number), device=device)
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return int(numbers)


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of `x` [*N] over its real rows, such that the ranks' average of it is the mean over all ranks' real rows.

    DDP averages gradients over ranks. With a mask, ranks may hold different numbers of real rows, so each divides its
    own sum by the *mean* count over ranks instead of its own. `mask=None` says that every row of every rank is real.
    """
    if mask is None:
        return x.mean()
    mean_count = all_reduce_sum(mask.sum(dtype=torch.float32)) / world_size()
    return (x * mask).sum() / mean_count.clamp(min=1.0)


def row_means(mask: Tensor | None, *values: Tensor) -> Tensor:
    """The mean of each of several values [*N] over this rank's real rows, to be logged."""
    table = torch.stack(values).flatten(1)
    return table.mean(1) if mask is None else (table * mask.flatten()).sum(1) / mask.sum().clamp(min=1)


def rank_mean(x: Tensor) -> Tensor:
    """The average of `x` over ranks, in place."""
    return all_reduce_sum(x).div_(world_size())


def standardize(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """`x` shifted and scaled to mean 0 and standard deviation 1 over the real rows of all ranks."""
    ones = torch.ones_like(x) if mask is None else mask.to(x.dtype)
    total, count = all_reduce_sum(torch.stack([(x * ones).sum(), ones.sum()]))
    centered = x - total / count.clamp(min=1.0)
    square = all_reduce_sum((centered.square() * ones).sum())
    return centered / ((square / (count - 1).clamp(min=1.0)).sqrt() + 1e-8)
