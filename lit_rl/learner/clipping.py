"""Bounds of gradients."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Clipping:
    """How gradients are bounded.

    Attributes:
        bound: of what `by` names; None leaves gradients as they are.
        by: the "global_norm" of all together, the "norm" of each parameter's, or the absolute "value" of each number.
    """

    bound: float | None = None
    by: str = "global_norm"


def factor(norm: Tensor, bound: float) -> Tensor:
    """What a gradient of some norm is multiplied by, so that its norm is at most `bound`."""
    return (bound / (norm + 1e-6)).clamp(max=1.0)


def clip_gradients(grads: list[Tensor], norms: Sequence[Tensor], norm: Tensor, bound: float, by: str) -> None:
    """Bound gradients in place, whose own norms and global norm are known.

    As `nn.utils.clip_grad_norm_` and `clip_grad_value_` do, in half their time: they sort gradients by device first.
    """
    if by == "value":
        torch._foreach_clamp_min_(grads, -bound)
        torch._foreach_clamp_max_(grads, bound)
    elif by == "norm":
        torch._foreach_mul_(grads, [factor(each, bound) for each in norms])
    else:
        torch._foreach_mul_(grads, factor(norm, bound))
