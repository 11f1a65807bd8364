"""Target networks: copies that follow a network slowly."""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def target_of(network: Module) -> Module:
    """A copy that is not trained: it follows by a `Follower`."""
    return copy.deepcopy(network).requires_grad_(False)


class Follower:
    """Moves a target network's parameters towards the network's: target += tau (network - target). Buffers are copied.

    Args:
        target: what `target_of` made.
        network: of which.
    """

    def __init__(self, target: nn.Module, network: nn.Module):
        self._target: list[Tensor] = list(target.parameters())
        self._network: list[Tensor] = list(network.parameters())
        # A module moved to a device has other buffers than before: they are looked up each time, if there are any.
        self._with_buffers = (target, network) if any(True for _ in network.buffers()) else ()

    @torch.no_grad()
    def __call__(self, tau: float, when: bool | Tensor = True) -> None:
        """Move the target, if `when` is True: what a gradient step returned, a tensor if only the device knows."""
        if not isinstance(when, Tensor) and not when:
            return
        if isinstance(when, Tensor):
            torch._foreach_lerp_(self._target, self._network, [when * tau] * len(self._target))
        else:
            torch._foreach_lerp_(self._target, self._network, tau)
        if self._with_buffers:
            target, network = self._with_buffers
            buffers = list(network.buffers())
            if isinstance(when, Tensor):
                buffers = [torch.where(when, new, old) for new, old in zip(buffers, target.buffers())]
            torch._foreach_copy_(list(target.buffers()), buffers)
