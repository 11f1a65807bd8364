"""The default network: its numpy form, and its name in checkpoints."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import jsonargparse
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

from lit_rl.errors import CheckpointError, OptionError, SpaceError
from lit_rl.networks import (
    MLP,
    ValueNetwork,
    build_network,
    check_nameable,
    describe_network,
    named_network,
    orthogonal,
    output_size,
)
from lit_rl.policy import Policy
from lit_rl.spec import EnvSpec

BOX = spaces.Box(-10, 10, (5,))
SPACES = pytest.mark.parametrize("space", [BOX, spaces.Discrete(4), spaces.Discrete(4, start=-2)], ids=str)


class OwnNetwork(nn.Module):
    """A user's network."""

    def __init__(self, observation_space: gym.Space, width: int = 7):
        super().__init__()
        self.layer = nn.Linear(observation_space.shape[0], width)
        self.output_size = width

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return self.layer(obs)


def own_function(observation_space: gym.Space, width: int = 3) -> nn.Module:
    return OwnNetwork(observation_space, width)


def own_factory(network: type[MLP], observation_space: gym.Space, width: int = 3) -> nn.Module:
    return network(observation_space, hidden_sizes=[width, width])


def observations(space: gym.Space, batch: int = 32) -> np.ndarray:
    space.seed(0)
    return np.array([space.sample() for _ in range(batch)])


def mlp_and_head(space: gym.Space, hidden_sizes: Sequence[int], activation: str) -> tuple[MLP, nn.Linear]:
    torch.manual_seed(0)
    network = MLP(space, hidden_sizes=hidden_sizes, activation=activation)
    head = nn.Linear(network.output_size, 3)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.5)  # biases too
    return network, head


@SPACES
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("hidden_sizes", [(8,), (16, 8), (4, 4, 4)], ids=str)
def test_numpy_forward_equals_torch(space: gym.Space, activation: str, hidden_sizes: Sequence[int]) -> None:
    network, head = mlp_and_head(space, hidden_sizes, activation)
    obs = observations(space)
    given = obs.copy()
    found = network.numpy_forward(head)(obs)
    np.testing.assert_allclose(found, head(network(torch.as_tensor(obs))).detach(), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(obs, given)  # nothing is written into the observations


@SPACES
def test_numpy_forward_sees_updates_in_place(space: gym.Space) -> None:
    network, head = mlp_and_head(space, (8, 8), "tanh")
    forward, obs = network.numpy_forward(head), observations(space)
    before = forward(obs)
    optimizer = torch.optim.Adam([*network.parameters(), *head.parameters()], lr=0.1, fused=True)
    head(network(torch.as_tensor(obs))).square().sum().backward()
    optimizer.step()
    after = head(network(torch.as_tensor(obs))).detach().numpy()
    np.testing.assert_allclose(forward(obs), after, rtol=1e-5, atol=1e-6)
    assert np.abs(before - after).max() > 0.1


@pytest.mark.parametrize("activation", ["elu", "silu"])
def test_numpy_forward_is_left_out_where_there_is_none_and_the_policy_acts_in_torch(activation: str) -> None:
    network, head = mlp_and_head(BOX, (8,), activation)
    assert network.numpy_forward(head) is None
    policy = Policy(EnvSpec("e", BOX, spaces.Discrete(3)), network=functools.partial(MLP, activation=activation))
    assert_numpy_equals_torch(policy)


def assert_numpy_equals_torch(policy: Policy) -> None:
    obs = observations(policy.spec.observation_space)
    with torch.no_grad():
        expected = policy(torch.as_tensor(obs))
    np.testing.assert_allclose(policy.parameters_of(obs), expected, rtol=1e-5, atol=1e-6)


@SPACES
@pytest.mark.parametrize("action_space", [spaces.Discrete(3), spaces.Box(-1, 1, (2,))], ids=str)
def test_policy_parameters_in_numpy_equal_torch(space: gym.Space, action_space: gym.Space) -> None:
    policy = Policy(EnvSpec("e", space, action_space))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    assert_numpy_equals_torch(policy)


def test_policy_parameters_in_numpy_follow_the_normaliser() -> None:
    policy = Policy(EnvSpec("e", BOX, spaces.Box(-1, 1, (2,))), normalize_observations=True)
    nn.init.normal_(policy.head.weight)
    for scale in (1.0, 30.0, 0.01):  # the last makes observations that are clipped to +-10
        policy.update_normalizer(torch.randn(50, 5) * scale + scale)
        assert_numpy_equals_torch(policy)
    policy.normalizer.moments["/"].var.fill_(1e-6)
    assert (policy.inputs(torch.as_tensor(observations(BOX))).abs() == 10).any()
    assert_numpy_equals_torch(policy)


def test_mlp_takes_batches_of_any_rank() -> None:
    assert MLP(BOX)(torch.zeros(2, 3, 5)).shape == (2, 3, 64)
    assert MLP(spaces.Discrete(4))(torch.zeros(2, 3, dtype=torch.int64)).shape == (2, 3, 64)
    assert ValueNetwork(MLP(BOX))(torch.zeros(2, 3, 5)).shape == (2, 3)


def test_orthogonal_layers_keep_lengths_up_to_the_gain_and_start_without_bias() -> None:
    layer = orthogonal(nn.Linear(4, 16), gain=3.0)
    x = torch.randn(10, 4)
    torch.testing.assert_close(layer(x).norm(dim=-1), 3.0 * x.norm(dim=-1))
    assert (layer.bias == 0).all()


# --- what checkpoints say of a network ------------------------------------------------------------------------------


def from_config(*args: str) -> Callable[[gym.Space], nn.Module]:
    """What the command line makes of `--network lit_rl.networks.MLP --network.hidden_sizes [8]`."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--network", type=Callable[[gym.Space], nn.Module])
    config = parser.parse_args(args)
    return getattr(parser, "instantiate", parser.instantiate_classes)(config).network


@pytest.mark.parametrize(
    ("network", "hidden_sizes"),
    [
        (MLP, [64, 64]),
        (functools.partial(MLP, hidden_sizes=(8, 4)), [8, 4]),
        (functools.partial(functools.partial(MLP, hidden_sizes=(8, 4)), activation="relu"), [8, 4]),
        (None, [64, 64]),
    ],
    ids=["class", "partial", "nested partial", "default"],
)
def test_described_network_is_rebuilt_the_same(network: Any, hidden_sizes: list[int]) -> None:
    made, rebuilt = build_network(network, BOX), build_network(describe_network(network), BOX)
    assert str(rebuilt) == str(made)
    assert [layer.out_features for layer in rebuilt.layers if isinstance(layer, nn.Linear)] == hidden_sizes


def test_network_of_a_config_is_rebuilt_the_same() -> None:
    network = from_config("--network=lit_rl.networks.MLP", "--network.hidden_sizes=[8]", "--network.activation=relu")
    description = describe_network(network)
    assert description["name"] == "MLP"
    assert description["arguments"].items() >= {"hidden_sizes": [8], "activation": "relu"}.items()
    assert str(build_network(description, BOX)) == str(network(BOX))


def test_description_of_a_network_is_described_as_itself() -> None:
    description = describe_network(functools.partial(MLP, hidden_sizes=(8,)))
    assert describe_network(description) == description
    assert describe_network(named_network(description)) == description


@pytest.mark.parametrize("lambda_", [lambda space: MLP(space), functools.partial(lambda space, n: MLP(space), n=1)])
def test_lambda_is_refused_with_the_way_out(lambda_: Callable) -> None:
    with pytest.raises(CheckpointError, match=r"network=<lambda>.*Define.*name"):
        check_nameable(lambda_)


@pytest.mark.parametrize(
    "network", [None, MLP, functools.partial(MLP, hidden_sizes=(8,)), OwnNetwork, own_function, {"name": "MLP"}]
)
def test_networks_with_a_name_are_not_refused(network: Any) -> None:
    check_nameable(network)


@pytest.mark.parametrize(
    ("network", "name"),
    [
        (OwnNetwork, "OwnNetwork"),
        (functools.partial(OwnNetwork, width=3), "OwnNetwork"),
        (own_function, "own_function"),
        (functools.partial(own_function, width=3), "own_function"),
        (functools.partial(own_factory, MLP, width=3), "own_factory"),
    ],
)
def test_own_network_is_named_and_must_be_passed(network: Callable, name: str) -> None:
    description = describe_network(network)
    assert description == {"name": f"{__name__}:{name}"}
    with pytest.raises(CheckpointError, match=f"{__name__}:{name}.*network="):
        build_network(description, BOX)


def test_a_name_in_a_file_is_never_imported() -> None:
    with pytest.raises(CheckpointError, match="os:system"):
        named_network({"name": "os:system"})


@pytest.mark.parametrize("size", [None, "64"])
def test_network_without_output_size_is_told_what_is_missing(size: Any) -> None:
    network = nn.Linear(5, 5)
    if size is not None:
        network.output_size = size
    with pytest.raises(OptionError, match=f"network=Linear.*output_size.*{size!r}"):
        output_size(network)


@pytest.mark.parametrize(
    "space", [spaces.Text(4), spaces.Dict(a=spaces.Discrete(2), image=spaces.Box(0, 1, (8, 8, 3)))], ids=str
)
def test_mlp_refuses_other_spaces_and_names_them(space: gym.Space) -> None:
    with pytest.raises(SpaceError) as error:
        MLP(space)
    assert str(space) in str(error.value)


@pytest.mark.parametrize("kwargs", [{"hidden_sizes": []}, {"hidden_sizes": [8, 0]}, {"activation": "gelu"}], ids=str)
def test_mlp_names_the_option_it_refuses(kwargs: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(kwargs))}="):
        MLP(BOX, **kwargs)


class WrongSize(nn.Linear):
    """Says another number of features than it gives."""

    output_size = 7

    def __init__(self, space: spaces.Box):
        super().__init__(space.shape[0], 8)


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (
            WrongSize,
            r"network=WrongSize gives features of shape \(2, 8\).* its output_size says \(2, 7\)",
        ),
        (lambda space: 1 / 0, "network=<lambda> fails for Box.*ZeroDivisionError"),
        ("MLP", "network='MLP': expected a callable"),
    ],
)
def test_an_own_network_is_tried_out(network: object, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        build_network(network, BOX)
