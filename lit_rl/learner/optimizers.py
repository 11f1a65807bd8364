"""What the optimizers that torch does not have share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class OwnOptimizer(torch.optim.Optimizer):
    """Base of optimizers whose step can be left out on the device, as with torch's fused ones.

    If `found_inf` is set, a tensor, a step is taken where it is 0: nobody waits for it. A subclass gives `step_group`,
    and passes "capturable" to torch, which then loads the number of steps onto the parameters' device, where they are
    counted.
    """

    _step_supports_amp_scaling = True  # so torch names it, see `GradientSteps`
    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            stepped = [parameter for parameter in group["params"] if parameter.grad is not None]
            if stepped:
                self.step_group(group, stepped)
        return loss

    def step_group(self, group: dict[str, Any], stepped: list[Tensor]) -> None:
        """One step of those parameters of a group that have a gradient."""
        raise NotImplementedError(f"{type(self).__name__} must define step_group(group, stepped).")
