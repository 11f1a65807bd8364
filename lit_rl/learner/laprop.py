"""LaProp with adaptive gradient clipping."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lit_rl.learner.optimizers import OwnOptimizer

SMALLEST_NORM = 1e-3  # of a parameter, as the clipping counts it


class LaProp(OwnOptimizer):
    """LaProp (Ziyin et al. 2020, arXiv:2002.04839) after adaptive gradient clipping (Brock et al. 2021, 2102.06171).

    g <- g min(1, agc max(1e-3, |p|) / |g|)            of each tensor by itself
    v <- beta2 v + (1 - beta2) g^2,  u = g / (sqrt(v / (1 - beta2^t)) + eps)
    m <- beta1 m + (1 - beta1) u,    p <- p - lr_t m / (1 - beta1^t)

    Momentum comes after the scaling, so that one large gradient is not remembered by its size. The learning rate grows
    from 0 in the first step to `lr` after `warmup` steps.

    Args:
        parameters: to be stepped.
        lr: the learning rate after the warm-up.
        betas: of the momentum and of the mean square.
        eps: what is added to the root.
        agc: bound of a gradient's norm, as a share of its parameter's; None leaves gradients as they are.
        warmup: steps.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-20,
        agc: float | None = 0.3,
        warmup: int = 1000,
    ):
        options = {"lr": lr, "betas": betas, "eps": eps, "agc": agc, "warmup": warmup, "capturable": True}
        super().__init__(parameters, options)

    def step_group(self, group: dict[str, Any], stepped: list[Tensor]) -> None:
        for p in stepped:
            if not self.state[p]:
                zero = torch.zeros((), dtype=torch.float32, device=p.device)
                self.state[p] = {"step": zero, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        steps, means, squares = ([self.state[p][name] for p in stepped] for name in ("step", "exp_avg", "exp_avg_sq"))
        grads = [p.grad for p in stepped if p.grad is not None]
        taken = None if self.found_inf is None else (self.found_inf == 0).float()
        if taken is not None:  # a step that is not taken is one of gradient 0 and length 0
            grads = [torch.where(taken > 0, grad, 0.0) for grad in grads]
        if group["agc"] is not None:
            bounds = torch._foreach_norm(stepped)
            torch._foreach_clamp_min_(bounds, SMALLEST_NORM)
            factors = torch._foreach_div(bounds, torch._foreach_norm(grads))
            torch._foreach_mul_(factors, group["agc"])
            torch._foreach_clamp_max_(factors, 1.0)  # of a gradient of 0 it is infinity
            grads = list(torch._foreach_mul(grads, factors))
        beta1, beta2 = group["betas"]
        step = steps[0] + (1 if taken is None else taken)
        share1, share2 = (1.0 - beta if taken is None else (1.0 - beta) * taken for beta in (beta1, beta2))
        torch._foreach_mul_(squares, 1 - share2)
        torch._foreach_add_(squares, torch._foreach_mul(torch._foreach_mul(grads, grads), share2))
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, (1 - beta2**step).sqrt())
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_mul_(means, 1 - share1)
        torch._foreach_add_(means, torch._foreach_mul(torch._foreach_div(grads, roots), share1))
        lr = group["lr"] * ((step - 1) / group["warmup"]).clamp(max=1.0) if group["warmup"] else group["lr"]
        lr = lr / (1 - beta1**step) * (1.0 if taken is None else taken)
        torch._foreach_sub_(stepped, torch._foreach_mul(means, lr))
        torch._foreach_add_(steps, 1.0 if taken is None else taken)
