"""Optimizers' rules as pure functions on flat tensors: what a compiled step calls."""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lit_rl.errors import OptionError
from lit_rl.learner.laprop import SMALLEST_NORM, LaProp
from lit_rl.learner.rmsprop import RMSprop

# The optimizers that have a rule, and what all groups of their parameters must have alike.
KEPT: dict[type, tuple[str, ...]] = {
    torch.optim.Adam: ("betas", "eps"),
    RMSprop: ("decay", "eps"),
    LaProp: ("betas", "eps", "agc", "warmup"),
}


class Rule(Protocol):
    """One step of an optimizer on N parameters in one flat tensor.

    Attributes:
        STATE: what the optimizer keeps for each parameter, a flat tensor [N] each, by its own name for it; and what
            all of that is at first.
    """

    STATE: dict[str, float]

    def __call__(
        self, flat: Tensor, grad: Tensor, state: list[Tensor], lr: Tensor, step: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """The parameters and the state after the step; nothing is changed in place.

        Args:
            flat: the parameters, [N].
            grad: [N], clipped.
            state: as named by `STATE`.
            lr: the learning rate, [], or that of each parameter, [N].
            step: the number of this step, from 1, [].
        """


class Adam:
    """Algorithm 1 of Kingma and Ba 2015, arXiv:1412.6980, as `torch.optim.Adam` has it."""

    STATE: dict[str, float] = {"exp_avg": 0.0, "exp_avg_sq": 0.0}

    def __init__(self, betas: tuple[float, float], eps: float):
        self._betas, self._eps = betas, eps

    def __call__(
        self, flat: Tensor, grad: Tensor, state: list[Tensor], lr: Tensor, step: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        (mean, square), (beta1, beta2) = state, self._betas
        mean = torch.lerp(mean, grad, 1 - beta1)
        square = beta2 * square + (1 - beta2) * grad * grad
        # beta**step, which the compiler would raise to a power again for every parameter
        power1, power2 = (torch.exp(step * math.log(beta)) for beta in self._betas)
        denominator = (square / (1 - power2)).sqrt() + self._eps
        return flat - lr / (1 - power1) * mean / denominator, [mean, square]


class TensorFlowRMSprop:
    """`lit_rl.learner.rmsprop.RMSprop`."""

    STATE: dict[str, float] = {"square_avg": 1.0}

    def __init__(self, decay: float, eps: float):
        self._decay, self._eps = decay, eps

    def __call__(
        self, flat: Tensor, grad: Tensor, state: list[Tensor], lr: Tensor, step: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        square = self._decay * state[0] + (1 - self._decay) * grad * grad
        return flat - lr * grad / (square + self._eps).sqrt(), [square]


class ClippedLaProp:
    """`lit_rl.learner.laprop.LaProp` of parameters of some sizes."""

    STATE: dict[str, float] = {"exp_avg": 0.0, "exp_avg_sq": 0.0}

    def __init__(self, group: dict[str, Any], sizes: Sequence[int]):
        self._betas, self._eps, self._agc, self._warmup = (group[key] for key in ("betas", "eps", "agc", "warmup"))
        self._sizes = list(sizes)

    def __call__(
        self, flat: Tensor, grad: Tensor, state: list[Tensor], lr: Tensor, step: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        (mean, square), (beta1, beta2) = state, self._betas
        if self._agc is not None:
            grad = torch.cat([self._clipped(g, p) for g, p in zip(grad.split(self._sizes), flat.split(self._sizes))])
        square = beta2 * square + (1 - beta2) * grad * grad
        power1, power2 = (torch.exp(step * math.log(beta)) for beta in self._betas)
        mean = torch.lerp(mean, grad / ((square / (1 - power2)).sqrt() + self._eps), 1 - beta1)
        if self._warmup:
            lr = lr * ((step - 1) / self._warmup).clamp(max=1.0)
        return flat - lr / (1 - power1) * mean, [mean, square]

    def _clipped(self, grad: Tensor, parameter: Tensor) -> Tensor:
        bound = self._agc * torch.linalg.vector_norm(parameter).clamp(min=SMALLEST_NORM)
        return grad * (bound / torch.linalg.vector_norm(grad)).clamp(max=1.0)


def rule_of(optimizer: Any) -> Rule:
    """The rule of an optimizer, whose groups of parameters differ in their learning rates alone.

    Raises:
        OptionError: if there is none for it.
    """
    kind = type(optimizer)
    if kind not in KEPT:
        raise OptionError(
            "compile=True: expected configure_optimizers to return torch.optim.Adam, lit_rl.learner.rmsprop.RMSprop or "
            f"lit_rl.learner.laprop.LaProp, got {kind.__module__}.{kind.__name__}. Leave it out."
        )
    first = optimizer.param_groups[0]
    for group in optimizer.param_groups:
        for name in ("weight_decay", "amsgrad", "maximize"):
            if group.get(name):
                raise OptionError(f"compile=True: expected Adam without {name}, got {group[name]!r}. Leave it out.")
        for name in KEPT[kind]:
            if group[name] != first[name]:
                raise OptionError(
                    f"compile=True: expected one {name} for all parameters, got {first[name]!r} and {group[name]!r}. "
                    "Leave it out."
                )
    if kind is LaProp:
        return ClippedLaProp(first, [p.numel() for group in optimizer.param_groups for p in group["params"]])
    if kind is RMSprop:
        return TensorFlowRMSprop(first["decay"], first["eps"])
    return Adam(first["betas"], first["eps"])
