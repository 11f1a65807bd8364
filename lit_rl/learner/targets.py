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
    def __call__(self, tau: float) -> None:
        torch._foreach_lerp_(self._target, self._network, tau)
        if self._with_buffers:
            target, network = self._with_buffers
            torch._foreach_copy_(list(target.buffers()), list(network.buffers()))
