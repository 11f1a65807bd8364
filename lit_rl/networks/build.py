"""From what a user passes as `network=` to a network, and to plain data that names it.

A network is any `nn.Module` made by a callable `(observation_space) -> nn.Module` that maps observations [*B, *obs] to
features [*B, output_size] and says its `output_size`. `PPO(network=...)` takes such a callable: a class, a
`functools.partial` of one, or a function. The built-in ones are listed in `NETWORKS`, from which checkpoints are
rebuilt by name, and may be given as in a config: `{"class_path": "MLP", "init_args": {"hidden_sizes": [8]}}`.

What a network is given: bytes (uint8) as they are, any other Box and MultiBinary as float32, Discrete and
MultiDiscrete as int64; for a Dict or Tuple space a dict of these, "0", "1", ... for a Tuple's elements. A network with
memory takes and returns a state as well: see `lit_rl.networks.recurrent`.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from lit_rl.errors import CheckpointError, LitRLError, OptionError
from lit_rl.options import Limit
from lit_rl.spec import has_images, is_image
from lit_rl.trees import Tree, children, from_env, is_leaf, iterate, map_tree

NetworkFactory = Callable[[gym.Space], nn.Module]


class MakesNetwork(Limit):
    """What makes a network for an observation space."""

    def accepts(self, value: Any) -> bool:
        return isinstance(value, dict) or (callable(value) and not isinstance(value, nn.Module))

    def __call__(self, name: str, value: Any) -> Any:
        if self.accepts(value):
            return value
        given = f"a {type(value).__name__} object" if isinstance(value, nn.Module) else repr(value)
        raise OptionError(
            f"{name}={given}: expected a callable from an observation space to an nn.Module, such as the class itself "
            "or a functools.partial of it: functools.partial(MLP, hidden_sizes=[64, 64])."
        )

    def __repr__(self) -> str:
        return "a callable or a dict"


Network = Annotated[NetworkFactory | dict[str, Any], MakesNetwork()]

# Which names a checkpoint may ask for. A file never makes lit_rl import anything.
NETWORKS: dict[str, Callable[..., nn.Module]] = {}


def built_in(network: type[nn.Module]) -> type[nn.Module]:
    """Class decorator: a checkpoint may name this network."""
    NETWORKS[network.__name__] = network
    return network


def has_memory(network: nn.Module) -> bool:
    """Whether a network takes and returns a state."""
    return hasattr(network, "initial_state")


def default_network(observation_space: gym.Space) -> nn.Module:
    """The network for a space where none is asked for.

    Two hidden layers of 64 tanh units for whatever can be made a vector; for images NatureCNN, or ImpalaResNet where
    they are too small for it; for a Dict or Tuple with images in it MultiInput.
    """
    if children(observation_space) is not None:
        return NETWORKS["MultiInput" if has_images(observation_space) else "MLP"](observation_space)
    if is_image(observation_space):
        nature: Any = NETWORKS["NatureCNN"]
        small = sorted(observation_space.shape or ())[-2] < nature.SMALLEST
        return NETWORKS["ImpalaResNet" if small else "NatureCNN"](observation_space)
    return NETWORKS["MLP"](observation_space)


NETWORKS["default_network"] = default_network


def as_input(space: gym.Space, obs: Tree) -> Tree:
    """Observations in tensors, as networks are given them: everything but bytes and class numbers as float32."""
    parts = children(space)
    if parts is not None:
        return {key: as_input(part, obs[key]) for key, part in parts.items()}
    keep = isinstance(space, spaces.Discrete | spaces.MultiDiscrete)
    keep = keep or (isinstance(space, spaces.Box) and space.dtype == np.uint8)
    return obs if keep else obs.float()


def output_size(network: nn.Module) -> int:
    """How many features a network gives.

    Raises:
        OptionError: if it does not say.
    """
    size = getattr(network, "output_size", None)
    if isinstance(size, int) and size > 0:
        return size
    raise OptionError(
        f"network={type(network).__name__}: expected a module with an integer attribute `output_size` "
        f"(how many features it gives), got {size!r}. Set it in the network's __init__."
    )


def build_network(
    network: NetworkFactory | dict[str, Any] | None, observation_space: gym.Space, option: str = "network"
) -> nn.Module:
    """A new network for `observation_space`: from a callable, from plain data, or the default.

    Args:
        network: what makes it.
        observation_space: of what it is given.
        option: how messages name it.

    Raises:
        CheckpointError: if plain data names a network that is the user's own, and must be passed.
    """
    if network is None:
        return default_network(observation_space)
    if isinstance(network, dict) and "name" in network:
        return named_network(network, option)(observation_space)
    if isinstance(network, dict):
        network = _from_config(network, option)
    function = _unwrap(MakesNetwork()(option, network))[0]
    name = getattr(function, "__name__", type(function).__name__)
    try:
        module = network(observation_space)
        size = output_size(module)
        for batch in (2, 3):
            _try_out(module, name, size, observation_space, batch)
    except LitRLError:
        raise
    except Exception as error:
        message = " ".join(str(error).split())
        hint = " (A network with memory also defines initial_state.)" if "'state'" in message else ""
        raise OptionError(
            f"{option}={name} fails for {observation_space}: {type(error).__name__}: {message}{hint}"
        ) from error
    return module


def _try_out(network: Any, name: str, size: int, space: gym.Space, batch: int) -> None:
    """Give a network some observations, and hold what it returns against what it must.

    Raises:
        OptionError: naming the network.
    """
    samples = [from_env(space, space.sample()) for _ in range(batch)]
    obs = as_input(space, map_tree(lambda *rows: torch.as_tensor(np.stack(rows)), *samples))
    with torch.no_grad():
        if has_memory(network):
            before = _shapes(network.initial_state(batch))
            if not before or any(shape[:1] != (batch,) for shape in before.values()):
                raise OptionError(
                    f"network={name}: initial_state({batch}) gave {before or 'no tensors'}: expected a tensor "
                    f"[{batch}, ...] or a dict of such by name."
                )
            result = network(obs, network.initial_state(batch))
            if not isinstance(result, tuple) or len(result) != 2:
                raise OptionError(f"network={name}: forward(obs, state) must return (features, state).")
            features, after = result
            if _shapes(after) != before:
                raise OptionError(
                    f"network={name}: forward(obs, state) gave a state of {_shapes(after) or 'no tensors'}: expected "
                    f"{before}, as initial_state does."
                )
        else:
            features = network(obs)
    if not isinstance(features, Tensor) or features.dtype != torch.float32 or features.shape != (batch, size):
        given = f"{features.dtype} {tuple(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
        raise OptionError(
            f"network={name} gives features of {given} for {batch} observations: expected a torch.float32 tensor of "
            f"shape ({batch}, {size}), as its output_size says."
        )


def _shapes(state: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of a state's tensors by path; empty if it is no tree of float32 tensors."""
    if not is_leaf(state) and not all(isinstance(key, str) and "/" not in key and "." not in key for key in state):
        return {}
    found = dict(iterate(state, "state"))
    tensors = all(isinstance(leaf, Tensor) and leaf.dtype == torch.float32 for leaf in found.values())
    return {path: tuple(leaf.shape) for path, leaf in found.items()} if tensors else {}


def named_network(description: dict[str, Any], option: str = "network") -> NetworkFactory:
    """The callable that `describe_network` described; messages name it by an option.

    Raises:
        CheckpointError: if it is not a built-in one.
    """
    name = description["name"]
    if name not in NETWORKS:
        raise CheckpointError(
            f"The policy was trained with a network of your own, {name!r}: pass it as {option}=, in "
            "functools.partial(...) if it had arguments."
        )
    return functools.partial(NETWORKS[name], **description.get("arguments", {}))


def describe_network(network: NetworkFactory | dict[str, Any] | None) -> dict[str, Any] | None:
    """Plain data: a built-in network's name and arguments, or the name of the user's own."""
    if isinstance(network, dict) and "class_path" in network:
        network = _from_config(network)
    if network is None or isinstance(network, dict):
        return network
    function, arguments = _unwrap(network)
    for name, built_in in NETWORKS.items():
        if function is built_in:
            return {"name": name, "arguments": {key: _plain(value) for key, value in arguments.items()}}
    return {"name": f"{function.__module__}:{getattr(function, '__qualname__', type(function).__qualname__)}"}


def _from_config(network: dict[str, Any], option: str = "network") -> NetworkFactory:
    """The built-in network that a dict names as a config does.

    Raises:
        OptionError: if it names another one, which is not imported since the dict may come from a file.
    """
    path = network.get("class_path")
    names = {f"{cls.__module__}.{name}": name for name, cls in NETWORKS.items()}
    names |= {f"{package}{name}": name for name in NETWORKS for package in ("", "lit_rl.", "lit_rl.networks.")}
    arguments = network.get("init_args", {})
    if path not in names or not isinstance(arguments, Mapping) or not network.keys() <= {"class_path", "init_args"}:
        raise OptionError(
            f"{option}={network!r}: expected {{'class_path': ..., 'init_args': {{...}}}} with one of lit_rl's own, "
            f"{', '.join(sorted(NETWORKS))}. Pass another network as the class itself."
        )
    return functools.partial(NETWORKS[names[path]], **arguments)


def check_same_in_training(network: nn.Module) -> None:
    """Refuse layers that compute something else in training than in acting.

    No probability ratio would begin at 1, and a target network would not say what the network said.

    Raises:
        OptionError: naming the layer.
    """
    for module in network.modules():
        drops = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        if drops or isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise OptionError(
                f"network: it holds {module}, which computes other features in training than in acting, so that "
                "what is learned is not what acts. Leave it out (LayerNorm is the same in both)."
            )


def check_nameable(network: NetworkFactory | dict[str, Any] | None) -> None:
    """Refuse a network that a checkpoint could not name for the program that loads it.

    Raises:
        CheckpointError: for a lambda.
    """
    if not callable(network):
        return
    function, arguments = _unwrap(network)
    for argument in arguments.values():
        for inner in argument.values() if isinstance(argument, Mapping) else [argument]:
            check_nameable(inner)
    if getattr(function, "__name__", "") == "<lambda>":
        raise CheckpointError(
            "network=<lambda>: a checkpoint cannot name a lambda. Define the network's function or class with a name "
            "(load_policy and load_from_checkpoint then take it as network=), or train with enable_checkpointing=False."
        )


def _plain(argument: Any) -> Any:
    """A network's argument as plain data: networks inside of it are described too."""
    if callable(argument) or (isinstance(argument, dict) and "class_path" in argument):
        return describe_network(argument)
    if isinstance(argument, Mapping):
        return {key: _plain(value) for key, value in argument.items()}
    return list(argument) if isinstance(argument, tuple) else argument


def _unwrap(network: NetworkFactory) -> tuple[Any, dict[str, Any]]:
    """A callable's class or function, and the keyword arguments bound to it."""
    if isinstance(network, functools.partial):
        # jsonargparse makes partial(<its own function>, ..., cls, **init_args) of a `class_path` in a config.
        made_by_config = network.func.__module__.startswith("jsonargparse")
        classes = [argument for argument in network.args if inspect.isclass(argument)]
        return (classes[-1] if made_by_config and classes else network.func), dict(network.keywords)
    return network, {}
