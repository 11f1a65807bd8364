"""Losses: pure functions, one formula each, one value per sample (the caller takes the mean)."""

import torch
from torch import Tensor


def ppo_clip(log_ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """Clipped surrogate loss.

    -min(r A, clip(r, 1 - clip, 1 + clip) A) with r = exp(log_ratio): eq. 7 of Schulman et al. 2017, arXiv:1707.06347.
    The minimum clips r from above only where A > 0, and from below only where A < 0: said so, it takes half the time.

    Args:
        log_ratio: log pi(a|s) - log mu(a|s), shape [*N].
        advantage: normalised and detached by the caller, shape [*N].
        clip: how far the ratio may leave 1 before its gradient stops.

    >>> ppo_clip(torch.tensor([2.0]).log(), torch.tensor([2.0]), clip=0.2)
    tensor([-2.4000])
    """
    lowest = torch.where(advantage < 0, 1 - clip, 0.0)
    highest = torch.where(advantage > 0, 1 + clip, torch.inf)
    return -torch.clamp(log_ratio.exp(), lowest, highest) * advantage


def value_loss(value: Tensor, target: Tensor) -> Tensor:
    """Half the squared error of the critic, shape [*N]; `target` is detached by the caller.

    >>> value_loss(torch.tensor([1.0]), torch.tensor([3.0]))
    tensor([2.])
    """
    return 0.5 * (value - target).square()


def approximate_kl(log_ratio: Tensor) -> Tensor:
    """Low-variance, never negative estimate of KL(mu || pi) from samples of mu, shape [*N].

    (r - 1) - log r: "k3" of Schulman 2020, http://joschu.net/blog/kl-approx.html.

    >>> approximate_kl(torch.tensor([0.0]))
    tensor([0.])
    """
    return torch.expm1(log_ratio) - log_ratio
