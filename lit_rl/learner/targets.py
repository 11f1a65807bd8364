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
    """Moves a target network's parameters towards the network's: target += tau (network - target).

    Args:
        target: what `target_of` made.
        network: of which.
    """

    def __init__(self, target: nn.Module, network: nn.Module):
        self._target: list[Tensor] = list(target.parameters())
        self._network: list[Tensor] = list(network.parameters())

    @torch.no_grad()
    def __call__(self, tau: float) -> None:
        torch._foreach_lerp_(self._target, self._network, tau)
