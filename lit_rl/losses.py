"""Losses: pure functions, one formula each, one value per sample (the caller takes the mean)."""

import math

import torch
from torch import Tensor


def ppo_clip(log_ratio: Tensor, advantage: Tensor, clip: float | Tensor) -> Tensor:
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


def clipped_value_loss(value: Tensor, old_value: Tensor, target: Tensor, clip: float) -> Tensor:
    """The greater of `value_loss` and of that of a value no further than `clip` from the old one, shape [*N].

    As in OpenAI's baselines (ppo2); no part of the paper. `old_value` and `target` are detached by the caller.

    >>> clipped_value_loss(torch.tensor([1.0, 1.0]), torch.tensor([0.0, 0.0]), torch.tensor([2.0, 0.0]), clip=0.5)
    tensor([1.1250, 0.5000])
    """
    near = old_value + (value - old_value).clamp(-clip, clip)
    return torch.maximum(value_loss(value, target), value_loss(near, target))


def approximate_kl(log_ratio: Tensor) -> Tensor:
    """Low-variance, never negative estimate of KL(mu || pi) from samples of mu, shape [*N].

    (r - 1) - log r: "k3" of Schulman 2020, http://joschu.net/blog/kl-approx.html.

    >>> approximate_kl(torch.tensor([0.0]))
    tensor([0.])
    """
    return torch.expm1(log_ratio) - log_ratio


def td_loss(value: Tensor, target: Tensor, kind: str) -> Tensor:
    """Loss of a value of the given kind: "mse", half the squared error, or "huber", linear where the error exceeds 1.

    Huber: Mnih et al. 2015, doi:10.1038/nature14236, "clip the error term to be between -1 and 1". `target` is
    detached by the caller.

    >>> td_loss(torch.tensor([1.0, 1.0]), torch.tensor([1.5, 3.0]), "huber")
    tensor([0.1250, 1.5000])
    """
    error = value - target
    if kind == "mse":
        return 0.5 * error.square()
    return torch.nn.functional.huber_loss(value, target, reduction="none")


def expectile_loss(error: Tensor, expectile: float) -> Tensor:
    """|expectile - 1{u < 0}| u^2 of errors u = target - value; shape [*N].

    Its minimum is the expectile of the targets: their mean for 0.5, towards their greatest for 1. Eq. 4 of Kostrikov et
    al. 2021, arXiv:2110.06169.

    >>> expectile_loss(torch.tensor([2.0, -2.0]), expectile=0.75)
    tensor([3., 1.])
    """
    return torch.where(error < 0, 1 - expectile, expectile) * error.square()


def project(probability: Tensor, support: Tensor, reward: Tensor, discount: Tensor) -> Tensor:
    """A categorical distribution of returns, after a reward and a discount, put back onto its support, [M, Z].

    Each atom z moves to clip(reward + discount z, z_1, z_Z) and is shared out between its two neighbours: algorithm 1
    of Bellemare et al. 2017, arXiv:1707.06887.

    Args:
        probability: of the atoms, [M, Z].
        support: the atoms, evenly spaced, [Z].
        reward: [M].
        discount: [M]; 0 where nothing follows.

    >>> support = torch.tensor([0.0, 1.0, 2.0])
    >>> project(torch.tensor([[0.0, 0.0, 1.0]]), support, torch.tensor([0.5]), torch.tensor([0.5]))
    tensor([[0.0000, 0.5000, 0.5000]])
    """
    low, high, last = support[0], support[-1], len(support) - 1
    moved = (reward.unsqueeze(1) + discount.unsqueeze(1) * support).clamp(low, high)
    place = (moved - low) * (last / (high - low))  # in atoms from the lowest on
    below = place.long().clamp(max=last - 1)
    above_share = place - below
    projected = torch.zeros_like(probability)
    projected.scatter_add_(1, below, probability * (1 - above_share))
    return projected.scatter_add_(1, below + 1, probability * above_share)


def categorical_td_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy of a categorical distribution of returns [M, Z] and its projected target [M, Z]; shape [M].

    Bellemare et al. 2017, arXiv:1707.06887, algorithm 1.

    >>> categorical_td_loss(torch.zeros(1, 2), torch.tensor([[0.5, 0.5]]))
    tensor([0.6931])
    """
    return -(target * torch.log_softmax(logits, -1)).sum(-1)


def quantile_huber_loss(quantiles: Tensor, target: Tensor) -> Tensor:
    """Quantile regression towards samples of a distribution of returns; shape [*N].

    sum_i mean_j |tau_i - 1{u_ij < 0}| huber(u_ij), u_ij = target_j - quantile_i, tau_i = (i - 1/2) / Z: eqs. 9 and 10
    of Dabney et al. 2018, arXiv:1710.10044, with kappa = 1.

    Args:
        quantiles: [*N, Z].
        target: [*N, J], detached by the caller.

    >>> quantile_huber_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0]]))
    tensor([1.5000])
    """
    num = quantiles.shape[-1]
    tau = (torch.arange(num, device=quantiles.device, dtype=torch.float32) + 0.5) / num
    error = target.unsqueeze(-2) - quantiles.unsqueeze(-1)  # [*N, Z, J]
    size = error.detach().abs()
    weight = (tau.unsqueeze(-1) - (error.detach() < 0).to(tau.dtype)).abs()
    huber = torch.where(size < 1, 0.5 * error.square(), error.abs() - 0.5)
    return (weight * huber).mean(-1).sum(-1)


def symlog(x: Tensor) -> Tensor:
    """sign(x) log(1 + |x|): Webber 2012; numbers of any size, made small. `symexp` is its inverse.

    >>> symlog(torch.tensor([-1.0, 0.0]))
    tensor([-0.6931,  0.0000])
    """
    return x.sign() * x.abs().log1p()


def symexp(x: Tensor) -> Tensor:
    """sign(x) (exp(|x|) - 1).

    >>> symexp(symlog(torch.tensor([-3.0, 0.5])))
    tensor([-3.0000,  0.5000])
    """
    return x.sign() * x.abs().expm1()


def symexp_bins(num: int, limit: float = 20.0) -> Tensor:
    """An odd number of bins [Z] from -symexp(limit) to symexp(limit), evenly spaced before symexp; exactly symmetric.

    >>> symexp_bins(3, limit=1.0)
    tensor([-1.7183,  0.0000,  1.7183])
    """
    positive = symexp(torch.linspace(0.0, limit, num // 2 + 1))[1:]
    return torch.cat([-positive.flip(0), torch.zeros(1), positive])


def two_hot_mean(log_probs: Tensor, bins: Tensor) -> Tensor:
    """The mean [*N] of a distribution over symmetric bins [Z] with log-probabilities [*N, Z].

    Each bin is added up with the one opposite first, so that rounding leaves no trace: the greatest bin is 5e8, and
    equal probabilities have the mean 0 exactly.

    >>> two_hot_mean(torch.zeros(255).log_softmax(-1), symexp_bins(255))
    tensor(0.)
    """
    probs, middle = (log_probs * (1 / math.log(2))).exp2(), len(bins) // 2  # exp2, as MKL's exp is slow on AMD
    return (probs[..., middle + 1 :] - probs[..., :middle].flip(-1)) @ bins[middle + 1 :]


def two_hot_loss(log_probs: Tensor, target: Tensor, bins: Tensor) -> Tensor:
    """Cross entropy [*N] of log-probabilities [*N, Z] of bins and of numbers [*N, J], summed over these.

    A number's probability is shared out between the bins beside it, such that the mean is the number: eq. 8 to 10 of
    Hafner et al. 2023, arXiv:2301.04104. A number beyond the last bin counts as that bin.

    >>> two_hot_loss(torch.tensor([0.5, 0.25, 0.25]).log(), torch.tensor([0.0]), torch.tensor([-1.0, 1.0, 3.0]))
    tensor(1.0397)
    """
    target = target.detach().clamp(bins[0], bins[-1])
    below = (torch.bucketize(target, bins, right=True) - 1).clamp(max=len(bins) - 2)
    above_share = (target - bins[below]) / (bins[below + 1] - bins[below])
    pairs = torch.cat([below, below + 1], -1)
    shares = torch.cat([1 - above_share, above_share], -1)
    return -(log_probs.gather(-1, pairs) * shares).sum(-1)


def categorical_kl(log_probs: Tensor, other: Tensor) -> Tensor:
    """KL divergence [*N] of S categorical distributions together from others, log-probabilities [*N, S, K] each.

    >>> categorical_kl(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log())
    tensor(0.1438)
    """
    return (log_probs.exp() * (log_probs - other)).sum((-2, -1))


def kl_losses(posterior: Tensor, prior: Tensor, free_bits: float) -> tuple[Tensor, Tensor]:
    """The dynamics and the representation loss [*N] of latents with log-probabilities [*N, S, K]: eq. 5 of DreamerV3.

    max(KL(sg(posterior) || prior), free_bits) moves the prior, max(KL(posterior || sg(prior)), free_bits) the
    posterior. The maximum is of each row's sum over latents; below it there is no gradient.

    >>> kl_losses(torch.tensor([[[0.5, 0.5]]]).log(), torch.tensor([[[0.5, 0.5]]]).log(), free_bits=1.0)
    (tensor([1.]), tensor([1.]))
    """
    dynamics = categorical_kl(posterior.detach(), prior).clamp(min=free_bits)
    representation = categorical_kl(posterior, prior.detach()).clamp(min=free_bits)
    return dynamics, representation
