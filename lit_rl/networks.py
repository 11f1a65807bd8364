"""Networks chosen from an observation space.

A network is any `nn.Module` made by a callable `(observation_space) -> nn.Module` that maps observations [*B, *obs] to
features [*B, output_size] and says its `output_size`. `PPO(network=...)` takes such a callable: a class, a
`functools.partial` of one, or a function. The built-in ones are listed in `NETWORKS`, from which checkpoints are
rebuilt by name.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from lit_rl.checks import check_choice, check_count
from lit_rl.errors import CheckpointError, LitRLError, OptionError, SpaceError

NetworkFactory = Callable[[gym.Space], nn.Module]

ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "elu": nn.ELU, "silu": nn.SiLU}
_NUMPY_ACTIVATIONS: dict[type[nn.Module], Callable[[np.ndarray], np.ndarray]] = {
    nn.Tanh: lambda x: np.tanh(x, out=x),
    nn.ReLU: lambda x: np.maximum(x, 0, out=x),
}


class MLP(nn.Module):
    """Fully connected layers for flat observations: a Box of one dimension, or Discrete as one-hot.

    Args:
        observation_space: what the input looks like.
        hidden_sizes: width of each layer; the last is the `output_size`.
        activation: "tanh", "relu", "elu" or "silu", after every layer.

    Weights are orthogonal with gain sqrt(2), biases zero (Andrychowicz et al. 2021, arXiv:2006.05990).

    >>> MLP(spaces.Discrete(3), hidden_sizes=[8])(torch.tensor([0, 2])).shape
    torch.Size([2, 8])
    """

    def __init__(
        self, observation_space: gym.Space, *, hidden_sizes: Sequence[int] = (64, 64), activation: str = "tanh"
    ):
        super().__init__()
        check_choice("activation", activation, tuple(ACTIVATIONS))
        if not isinstance(hidden_sizes, Sequence) or not hidden_sizes:
            raise OptionError(f"hidden_sizes={hidden_sizes!r}: expected a list of at least one layer width.")
        self.num_classes = int(observation_space.n) if isinstance(observation_space, spaces.Discrete) else 0
        self._start = int(observation_space.start) if isinstance(observation_space, spaces.Discrete) else 0
        layers: list[nn.Module] = []
        input_size = self.num_classes or flat_size(observation_space)
        for size in hidden_sizes:
            linear = orthogonal(nn.Linear(input_size, check_count("hidden_sizes", size)), gain=2**0.5)
            layers += [linear, ACTIVATIONS[activation]()]
            input_size = size
        self.layers = nn.Sequential(*layers)
        self.output_size = input_size

    def forward(self, obs: Tensor) -> Tensor:
        if self.num_classes:
            obs = nn.functional.one_hot(obs.long() - self._start, self.num_classes).float()
        return self.layers(obs)

    def numpy_forward(self, head: nn.Linear) -> Callable[[np.ndarray], np.ndarray] | None:
        """`head(self(obs))` for numpy inputs, five times faster on a few rows; None if it cannot be had.

        The arrays inside share memory with the parameters: later updates in place are seen.
        """
        modules = [*self.layers, head]
        activations = [type(module) for module in modules[1:-1:2]]
        if head.weight.device.type != "cpu" or not all(kind in _NUMPY_ACTIVATIONS for kind in activations):
            return None
        linears = [module for module in modules if isinstance(module, nn.Linear)]
        weights = [(linear.weight.detach().numpy().T, linear.bias.detach().numpy()) for linear in linears]
        layers = [(w, b, _NUMPY_ACTIVATIONS[kind]) for (w, b), kind in zip(weights, activations)]
        head_weight, head_bias = weights[-1]
        first_weight = weights[0][0]
        one_hot, start = bool(self.num_classes), self._start

        def forward(x: np.ndarray) -> np.ndarray:
            for i, (weight, bias, activation) in enumerate(layers):
                # A one-hot row times a matrix is a row of the matrix.
                x = first_weight[x - start] if one_hot and i == 0 else x @ weight
                x += bias
                x = activation(x)
            x = x @ head_weight
            x += head_bias
            return x

        return forward


class ValueNetwork(nn.Module):
    """A critic: features of the observation to one number, [*B, *obs] -> [*B]."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder
        self.head = orthogonal(nn.Linear(output_size(encoder), 1), gain=1.0)

    def forward(self, obs: Tensor) -> Tensor:
        return self.head(self.encoder(obs)).squeeze(-1)


# Which names a checkpoint may ask for. A file never makes lit_rl import anything.
NETWORKS: dict[str, type[nn.Module]] = {"MLP": MLP}


def flat_size(space: gym.Space) -> int:
    """The number of inputs of a flat observation.

    Raises:
        SpaceError: for anything but a Box of one dimension.
    """
    if isinstance(space, spaces.Box) and len(space.shape) == 1:
        return space.shape[0]
    raise SpaceError(
        f"The default network takes a one-dimensional Box or a Discrete observation, got {space}. "
        "Wrap the environment (gymnasium.wrappers:FlattenObservation) or pass your own network=."
    )


def orthogonal(linear: nn.Linear, gain: float) -> nn.Linear:
    """Initialise a layer's weight orthogonally and its bias to zero; returns the layer."""
    nn.init.orthogonal_(linear.weight, gain)
    nn.init.zeros_(linear.bias)
    return linear


def output_size(network: nn.Module) -> int:
    """How many features a network gives.

    Raises:
        OptionError: if it does not say.
    """
    size = getattr(network, "output_size", None)
    if isinstance(size, int):
        return size
    raise OptionError(
        f"network={type(network).__name__}: expected a module with an integer attribute `output_size` "
        f"(how many features it gives), got {size!r}. Set it in the network's __init__."
    )


def build_network(network: NetworkFactory | dict[str, Any] | None, observation_space: gym.Space) -> nn.Module:
    """A new network for `observation_space`: from a callable, from `describe_network`'s plain data, or the default.

    Raises:
        CheckpointError: if plain data names a network that is the user's own, and must be passed.
    """
    if network is None:
        return MLP(observation_space)
    if isinstance(network, dict):
        return named_network(network)(observation_space)
    if not callable(network):
        raise OptionError(f"network={network!r}: expected a callable from an observation space to an nn.Module.")
    name = getattr(network, "__name__", repr(network))
    try:
        module = network(observation_space)
        size = output_size(module)
        obs = torch.as_tensor(np.stack([observation_space.sample()] * 2))
        with torch.no_grad():
            features = module(obs if isinstance(observation_space, spaces.Discrete) else obs.float())
    except LitRLError:
        raise
    except Exception as error:
        message = " ".join(str(error).split())
        raise OptionError(f"network={name} fails for {observation_space}: {type(error).__name__}: {message}") from error
    if features.shape != (2, size):
        raise OptionError(
            f"network={name} gives features of shape {tuple(features.shape)} for two observations, but its "
            f"output_size says (2, {size})."
        )
    return module


def named_network(description: dict[str, Any]) -> NetworkFactory:
    """The callable that `describe_network` described.

    Raises:
        CheckpointError: if it is not a built-in one.
    """
    name = description["name"]
    if name not in NETWORKS:
        raise CheckpointError(f"The policy was trained with a network of your own, {name!r}: pass it as network=.")
    return functools.partial(NETWORKS[name], **description.get("arguments", {}))


def describe_network(network: NetworkFactory | dict[str, Any] | None) -> dict[str, Any] | None:
    """Plain data: a built-in network's name and arguments, or the name of the user's own."""
    if network is None or isinstance(network, dict):
        return network
    function, arguments = _unwrap(network)
    for name, built_in in NETWORKS.items():
        if function is built_in:
            plain = {k: list(v) if isinstance(v, tuple) else v for k, v in arguments.items()}
            return {"name": name, "arguments": plain}
    return {"name": f"{function.__module__}:{getattr(function, '__qualname__', type(function).__qualname__)}"}


def check_nameable(network: NetworkFactory | dict[str, Any] | None) -> None:
    """Refuse a network that a checkpoint could not name for the program that loads it.

    Raises:
        CheckpointError: for a lambda.
    """
    if callable(network) and getattr(_unwrap(network)[0], "__name__", "") == "<lambda>":
        raise CheckpointError(
            "network=<lambda>: a checkpoint cannot name a lambda. Define the network's function or class with a name "
            "(load_policy and load_from_checkpoint then take it as network=), or train with enable_checkpointing=False."
        )


def _unwrap(network: NetworkFactory) -> tuple[Any, dict[str, Any]]:
    """A callable's class or function, and the keyword arguments bound to it."""
    if isinstance(network, functools.partial):
        # jsonargparse makes partial(<its own function>, ..., cls, **init_args) of a `class_path` in a config.
        made_by_config = network.func.__module__.startswith("jsonargparse")
        classes = [argument for argument in network.args if inspect.isclass(argument)]
        return (classes[-1] if made_by_config and classes else network.func), dict(network.keywords)
    return network, {}
