"""RMSProp with epsilon inside the root."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lit_rl.learner.optimizers import OwnOptimizer


class RMSprop(OwnOptimizer):
    """RMSProp as TensorFlow has it, and with it the papers that used it: epsilon is added to the mean square.

    s <- decay s + (1 - decay) g^2,  p <- p - lr g / sqrt(s + eps),  with s = 1 at first

    An epsilon of 0.1, as in the code of Espeholt et al. 2018, arXiv:1802.01561, means this form: `torch.optim.RMSprop`
    adds it to the root instead, and begins with s = 0.

    Args:
        parameters: to be stepped.
        lr: the learning rate.
        decay: of the running mean of squared gradients.
        eps: what is added to that mean.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float, decay: float = 0.99, eps: float = 0.1):
        super().__init__(parameters, {"lr": lr, "decay": decay, "eps": eps, "capturable": True})

    def step_group(self, group: dict[str, Any], stepped: list[Tensor]) -> None:
        for parameter in stepped:
            if not self.state[parameter]:
                step = torch.zeros((), device=parameter.device)
                self.state[parameter] = {"step": step, "square_avg": torch.ones_like(parameter)}
        grads: list[Any] = [parameter.grad for parameter in stepped]
        steps, squares = ([self.state[parameter][name] for parameter in stepped] for name in ("step", "square_avg"))
        decay: Any = group["decay"]
        if self.found_inf is None:
            torch._foreach_add_(steps, 1)
        else:  # a step that is not taken is one of gradient 0 and decay 1
            taken = self.found_inf == 0
            torch._foreach_add_(steps, [taken.float()] * len(steps))
            grads = [torch.where(taken, grad, 0.0) for grad in grads]
            decay = [torch.where(taken, decay, 1.0)] * len(grads)
        torch._foreach_mul_(squares, decay)
        torch._foreach_addcmul_(squares, grads, grads, 1 - group["decay"])
        roots = torch._foreach_add(squares, group["eps"])
        torch._foreach_sqrt_(roots)
        torch._foreach_addcdiv_(stepped, grads, roots, -group["lr"])
