"""A network with memory learns by what it acts by: its fast way through time is used only where it is the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

from lit_rl.networks import GRUNetwork, LSTMNetwork
from lit_rl.networks.recurrent import has_own_unroll, reset_rows, unroll
from lit_rl.trees import Tree, map_tree

SPACE = spaces.Box(-1, 1, (3,))


class Scaled(GRUNetwork):
    """Features times 3."""

    def forward(self, obs: Tree, state: Tree) -> tuple[Tensor, Tree]:
        features, state = super().forward(obs, state)
        return 3 * features, state


class ScaledBoth(Scaled):
    """And so is its own way through time."""

    def unroll(self, obs: Tree, state: Tree, is_init: Tensor) -> tuple[Tensor, Tree]:
        features, state = super().unroll(obs, state, is_init)
        return 3 * features, state


def hooked(network: Any) -> Any:
    network.register_forward_hook(lambda module, inputs, output: (output[0] + 1, output[1]))
    return network


def hooked_cell(network: Any) -> Any:
    network.cell.register_forward_hook(lambda module, inputs, output: output * 0.5)
    return network


def normed(network: Any) -> Any:
    nn.utils.parametrizations.weight_norm(network.cell, "weight_hh")
    with torch.no_grad():
        network.cell.parametrizations.weight_hh.original0.mul_(2)
    return network


@pytest.mark.parametrize(
    ("make", "is_fast"),
    [
        (lambda: GRUNetwork(SPACE), True),
        (lambda: LSTMNetwork(SPACE), True),
        (lambda: Scaled(SPACE), False),
        (lambda: ScaledBoth(SPACE), True),
        (lambda: hooked(GRUNetwork(SPACE)), False),
        (lambda: hooked_cell(GRUNetwork(SPACE)), False),
        (lambda: normed(GRUNetwork(SPACE)), False),
    ],
    ids=["GRU", "LSTM", "own forward", "both own", "hook", "hook on the cell", "weight_norm"],
)
def test_unrolling_equals_stepping(make: Callable[[], Any], is_fast: bool) -> None:
    torch.manual_seed(0)
    network = make()
    assert has_own_unroll(network) == is_fast
    obs, is_init = torch.rand(2, 5, 3), torch.zeros(2, 5, dtype=torch.bool)
    is_init[0, 3] = True
    state = initial = network.initial_state(2)
    features, after = unroll(network, obs, state, is_init)
    for t in range(5):
        state = reset_rows(state, initial, is_init[:, t])
        step, state = network(obs[:, t], state)
        torch.testing.assert_close(features[:, t], step)
    for x, y in zip(after.values(), map_tree(lambda x: x, state).values()):
        torch.testing.assert_close(x[:, -1], y)
