"""RMSProp with epsilon inside the root."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class RMSprop(torch.optim.Optimizer):
    """RMSProp as TensorFlow has it, and with it the papers that used it: epsilon is added to the mean square.

    s <- decay s + (1 - decay) g^2,  p <- p - lr g / sqrt(s + eps),  with s = 1 at first

    An epsilon of 0.1 means this form (Espeholt et al. 2018, arXiv:1802.01561, table G.1): `torch.optim.RMSprop` adds it
    to the root instead, and begins with s = 0.

    Args:
        parameters: to be stepped.
        lr: the learning rate.
        decay: of the running mean of squared gradients.
        eps: what is added to that mean.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float, decay: float = 0.99, eps: float = 0.1):
        super().__init__(parameters, {"lr": lr, "decay": decay, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            stepped = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not stepped:
                continue
            for parameter in stepped:
                if not self.state[parameter]:
                    self.state[parameter] = {"step": torch.zeros(()), "square_avg": torch.ones_like(parameter)}
                self.state[parameter]["step"] += 1
            grads: list[Any] = [parameter.grad for parameter in stepped]
            squares = [self.state[parameter]["square_avg"] for parameter in stepped]
            torch._foreach_mul_(squares, group["decay"])
            torch._foreach_addcmul_(squares, grads, grads, 1 - group["decay"])
            roots = torch._foreach_add(squares, group["eps"])
            torch._foreach_sqrt_(roots)
            torch._foreach_addcdiv_(stepped, grads, roots, -group["lr"])
        return loss
