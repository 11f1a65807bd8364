"""Fully connected networks: for vectors, and for several parts of an observation."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor, nn

from lit_rl.errors import OptionError, SpaceError
from lit_rl.networks.build import NetworkFactory, build_network, built_in, has_memory, output_size
from lit_rl.networks.inputs import FlatInput
from lit_rl.options import Count, OneOf, check
from lit_rl.spec import has_images, is_image
from lit_rl.trees import Tree, children, find, space_leaves

ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "elu": nn.ELU, "silu": nn.SiLU}


def orthogonal(layer: Any, gain: float) -> Any:
    """Initialise a layer's weight orthogonally and its bias to zero; returns the layer."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def _xavier(layer: Any, gain: float) -> Any:
    nn.init.xavier_uniform_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def _kaiming(layer: Any, gain: float) -> Any:
    nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
    nn.init.zeros_(layer.bias)
    return layer


INITIALIZERS: dict[str, Callable[[Any, float], Any]] = {
    "orthogonal": orthogonal,
    "xavier_uniform": _xavier,
    "kaiming_uniform": _kaiming,
    "torch": lambda layer, gain: layer,
}


@built_in
class MLP(nn.Module):
    """Fully connected layers for an observation that is a vector, or can be made one (see `FlatInput`).

    Args:
        observation_space: what the input looks like.
        hidden_sizes: width of each layer; the last is the `output_size`.
        activation: "tanh", "relu", "elu" or "silu", after every layer.
        layer_norm: normalise each layer's outputs before the activation.
        init: weights "orthogonal" with gain sqrt(2) (Andrychowicz et al. 2021, arXiv:2006.05990), "xavier_uniform",
            "kaiming_uniform", each with zero biases, or as "torch" leaves them.
        embedding_size: numbers per value of Discrete and MultiDiscrete observations; None for one-hot.

    Raises:
        SpaceError: for images inside a Dict or Tuple: `MultiInput` takes those.

    >>> MLP(gym.spaces.Discrete(3), hidden_sizes=[8])(torch.tensor([0, 2])).shape
    torch.Size([2, 8])
    """

    def __init__(
        self,
        observation_space: gym.Space,
        *,
        hidden_sizes: Sequence[int] = (64, 64),
        activation: str = "tanh",
        layer_norm: bool = False,
        init: str = "orthogonal",
        embedding_size: int | None = None,
    ):
        super().__init__()
        if children(observation_space) and has_images(observation_space):
            raise SpaceError(f"MLP cannot read the images in {observation_space}: use network=MultiInput.")
        self.input = FlatInput(observation_space, embedding_size)
        self.layers, self.output_size = dense(self.input.output_size, hidden_sizes, activation, layer_norm, init)

    def forward(self, obs: Tree) -> Tensor:
        return self.layers(self.input(obs))


@built_in
class MultiInput(nn.Module):
    """For Dict and Tuple observations: one encoder per leaf, fused by fully connected layers.

    Args:
        observation_space: of any nesting.
        encoders: networks for leaves by path ("camera", "arm/position", "0" for a Tuple's first element). Without one,
            an image gets a convolutional network (`default_network`), and any other leaf goes to the fusing layers as
            the vector that `FlatInput` makes of it.
        hidden_sizes, activation, layer_norm, init: of the fusing layers, as in `MLP`.
        embedding_size: as in `MLP`.

    Raises:
        OptionError: if `encoders` names a leaf that is not there.
    """

    def __init__(
        self,
        observation_space: gym.Space,
        *,
        encoders: Mapping[str, NetworkFactory] | None = None,
        hidden_sizes: Sequence[int] = (64, 64),
        activation: str = "tanh",
        layer_norm: bool = False,
        init: str = "orthogonal",
        embedding_size: int | None = None,
    ):
        super().__init__()
        if not (encoders is None or isinstance(encoders, Mapping)):
            raise OptionError(
                f"encoders={encoders!r}: expected a dict from parts, such as 'arm/position', to networks."
            )
        leaves, encoders = space_leaves(observation_space), dict(encoders or {})
        if children(observation_space) is None:
            raise SpaceError(
                f"MultiInput takes a Dict or Tuple observation, got {observation_space}: use MLP or a CNN."
            )
        unknown = sorted(encoders.keys() - leaves.keys())
        if unknown:
            raise OptionError(
                f"encoders: {unknown[0]!r} is no part of the observation: expected one of {list(leaves)}."
            )
        self.encoders = nn.ModuleDict()
        for path, space in leaves.items():
            if path in encoders or is_image(space):
                self.encoders[path] = build_network(encoders.get(path), space)
            else:
                self.encoders[path] = FlatInput(space, embedding_size)
        for path, encoder in self.encoders.items():
            if has_memory(encoder):
                raise OptionError(f"encoders[{path!r}]={type(encoder).__name__}: expected a network without memory.")
        size = sum(output_size(encoder) for encoder in self.encoders.values())
        self.layers, self.output_size = dense(size, hidden_sizes, activation, layer_norm, init)

    def forward(self, obs: Tree) -> Tensor:
        return self.layers(torch.cat([encoder(find(obs, path)) for path, encoder in self.encoders.items()], -1))


def dense(
    input_size: int, hidden_sizes: Sequence[int], activation: str, layer_norm: bool, init: str
) -> tuple[nn.Sequential, int]:
    """Fully connected layers, and the width of the last one.

    Raises:
        OptionError: for an option that has no such value.
    """
    OneOf(*ACTIVATIONS)("activation", activation)
    OneOf(*INITIALIZERS)("init", init)
    check("layer_norm", layer_norm, bool)
    if not isinstance(hidden_sizes, Sequence) or isinstance(hidden_sizes, str) or not hidden_sizes:
        raise OptionError(f"hidden_sizes={hidden_sizes!r}: expected a list of at least one layer width.")
    layers: list[nn.Module] = []
    for size in hidden_sizes:
        layers.append(INITIALIZERS[init](nn.Linear(input_size, check("hidden_sizes", size, Count)), 2**0.5))
        if layer_norm:
            layers.append(nn.LayerNorm(size))
        layers.append(ACTIVATIONS[activation]())
        input_size = size
    return nn.Sequential(*layers), input_size
