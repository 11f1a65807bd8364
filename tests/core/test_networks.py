"""The default network, and its name in checkpoints."""

import functools
from collections.abc import Callable
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
    GRUNetwork,
    ImpalaResNet,
    LSTMNetwork,
    MultiInput,
    NatureCNN,
    ValueNetwork,
    as_input,
    build_network,
    check_nameable,
    describe_network,
    named_network,
    orthogonal,
    output_size,
)
from lit_rl.networks.inputs import FlatInput, ImageInput
from lit_rl.trees import to_numpy

BOX = spaces.Box(-10, 10, (5,))


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


CONFIG = {"class_path": "MLP", "init_args": {"hidden_sizes": [8], "activation": "relu"}}


@pytest.mark.parametrize("path", ["MLP", "lit_rl.MLP", "lit_rl.networks.MLP", "lit_rl.networks.mlp.MLP"])
def test_a_network_may_be_given_as_a_config_has_it(path: str) -> None:
    network = functools.partial(MLP, hidden_sizes=[8], activation="relu")
    for given in (CONFIG | {"class_path": path}, describe_network(CONFIG)):
        assert str(build_network(given, BOX)) == str(network(BOX))
        assert describe_network(given) == describe_network(network)
    outer_path = path.replace("MLP", "LSTMNetwork").replace("mlp", "recurrent")
    outer = {"class_path": outer_path, "init_args": {"encoder": CONFIG}}
    network = functools.partial(LSTMNetwork, encoder=network)
    assert str(build_network(outer, BOX)) == str(network(BOX)) and describe_network(outer) == describe_network(network)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"class_path": "os.system"},
            r"critic_network=\{'class_path': 'os.system'\}: expected .* Pass another network",
        ),
        ({"class_path": f"{__name__}.OwnNetwork"}, "GRUNetwork, .* Pass another network as the class itself"),
        ({"class": "MLP"}, r"expected \{'class_path': \.\.\., 'init_args'"),
        (CONFIG | {"arguments": {}}, r"expected \{'class_path'"),
        ({"class_path": "MLP", "init_args": [8]}, r"expected \{'class_path'"),
        ({"class_path": "MLP", "init_args": {"hiden": [8]}}, "critic_network=MLP fails for .* argument 'hiden'"),
    ],
)
def test_what_is_no_network_of_a_config_is_refused(given: dict, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        build_network(given, BOX, "critic_network")


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


def wrong(forward: Callable, **methods: Any) -> type[nn.Module]:
    """A network with these methods."""

    def init(self: nn.Module, observation_space: gym.Space) -> None:
        nn.Module.__init__(self)

    return type("Wrong", (nn.Module,), {"__init__": init, "output_size": 4, "forward": forward, **methods})


def memory(self: nn.Module, obs: torch.Tensor, state: torch.Tensor) -> Any:
    return torch.zeros(len(obs), 4), torch.zeros(len(obs), 4)


def start(self: nn.Module, num_envs: int) -> torch.Tensor:
    return torch.zeros(num_envs, 4)


class WrongSize(nn.Linear):
    """Says another number of features than it gives."""

    output_size = 7

    def __init__(self, space: spaces.Box):
        super().__init__(space.shape[0], 8)


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (WrongSize, r"network=WrongSize gives features of torch.float32 \(2, 8\).* \(2, 7\), as its output_size says"),
        (MLP(BOX), r"network=a MLP object: expected a callable.*the class itself"),
        (wrong(lambda self, obs: None), "gives features of NoneType for 2 observations"),
        (wrong(lambda self, obs: torch.zeros(len(obs), 4, dtype=torch.float64)), r"features of torch.float64 \(2, 4\)"),
        (wrong(lambda self, obs, state: obs), r"missing 1 required.*'state'.*defines initial_state"),
        (
            wrong(memory, initial_state=lambda self, n: torch.zeros(2, 4)),
            r"initial_state\(3\) gave {'state': \(2, 4\)}",
        ),
        (wrong(memory, initial_state=lambda self, n: (torch.zeros(n, 4),)), r"initial_state\(2\) gave no tensors"),
        (
            wrong(memory, initial_state=lambda self, n: {"a/b": torch.zeros(n, 4)}),
            r"initial_state\(2\) gave no tensors",
        ),
        (wrong(memory, initial_state=lambda self, n: torch.zeros(n, 5)), r"gave a state of.*\(2, 4\).*\(2, 5\)"),
        (wrong(lambda self, obs, state: state, initial_state=start), r"must return \(features, state\)"),
        (lambda space: 1 / 0, "network=<lambda> fails for Box.*ZeroDivisionError"),
        ("MLP", "network='MLP': expected a callable"),
        ({"class": "lit_rl.MLP"}, r"network={'class': 'lit_rl.MLP'}: expected \{'class_path': \.\.\.,"),
    ],
)
def test_an_own_network_is_tried_out(network: object, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        build_network(network, BOX)


NESTED = spaces.Dict(
    z=spaces.Box(0, 200, (2,), np.uint8),
    a=spaces.Tuple([spaces.Discrete(3, start=1), spaces.MultiDiscrete([2, 3], start=[0, 4])]),
    m=spaces.MultiBinary(2),
    f=spaces.Box(0, 1, (2, 2), np.bool_),
)


def test_a_nested_observation_becomes_one_vector_in_the_spaces_order() -> None:
    obs = {
        "z": torch.tensor([[100, 200]], dtype=torch.uint8),
        "a": {"0": torch.tensor([2]), "1": torch.tensor([[1, 6]])},
        "m": torch.tensor([[0, 1]], dtype=torch.uint8),
        "f": torch.tensor([[[1, 0], [0, 1]]], dtype=torch.uint8),
    }
    vector = FlatInput(NESTED)(as_input(NESTED, obs))
    assert vector.tolist() == [[0.5, 1, 0, 1, 0, 0, 1, 0, 0, 1, 0, 1, 1, 0, 0, 1]]
    np.testing.assert_allclose(FlatInput(NESTED).numpy(to_numpy(obs)), vector)
    assert FlatInput(NESTED).output_size == 16


def test_embeddings_give_every_value_a_vector_of_its_own() -> None:
    embedded = FlatInput(NESTED, embedding_size=3)
    assert embedded.output_size == 2 + 3 + 6 + 2 + 4
    space = spaces.MultiDiscrete([2, 2])
    network = FlatInput(space, embedding_size=2)
    rows = network(torch.tensor([[0, 0], [0, 1], [1, 0]]))
    assert rows[0, :2].equal(rows[1, :2]) and not rows[0, 2:].equal(rows[1, 2:]) and not rows[0, :2].equal(rows[0, 2:])


@pytest.mark.parametrize(
    ("shape", "channels", "expected"),
    [
        ((84, 84, 3), "auto", (3, 84, 84)),
        ((4, 84, 84), "auto", (4, 84, 84)),
        ((40, 60), "auto", (1, 40, 60)),
        ((40, 40, 40), "first", (40, 40, 40)),
        ((40, 60, 40), "last", (40, 40, 60)),
    ],
)
def test_channels_are_recognised_first_or_last(shape: tuple, channels: str, expected: tuple) -> None:
    image_input = ImageInput(spaces.Box(0, 255, shape, np.uint8), channels)
    assert image_input.shape == expected
    obs = torch.randint(0, 255, (2, *shape), dtype=torch.uint8)
    images = image_input(obs)
    assert images.shape == (2, *expected) and images.max() <= 1
    last = channels == "last" or shape[-1] == 3
    wanted = obs.movedim(-1, 1) if last else obs.reshape(2, *expected)
    torch.testing.assert_close(images, wanted / 255)


def test_channels_that_are_not_clear_are_asked_for() -> None:
    with pytest.raises(SpaceError, match=r"channels is not clear.*'first' or 'last'"):
        NatureCNN(spaces.Box(0, 255, (40, 40, 40), np.uint8))
    with pytest.raises(OptionError, match="channels='middle'"):
        NatureCNN(spaces.Box(0, 255, (40, 40, 3), np.uint8), channels="middle")


def test_nature_cnn_has_the_papers_layers() -> None:
    network = NatureCNN(spaces.Box(0, 255, (84, 84, 4), np.uint8))
    weights = [4 * 32 * 64, 32 * 64 * 16, 64 * 64 * 9, 3136 * 512]
    biases = [32, 64, 64, 512]
    assert sum(p.numel() for p in network.parameters()) == sum(weights) + sum(biases)


def test_impala_resnet_has_the_papers_layers() -> None:
    network = ImpalaResNet(spaces.Box(0, 255, (3, 72, 96), np.uint8))
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [16] * 5 + [32] * 10
    assert network.linear.in_features == 32 * 9 * 12


@pytest.mark.parametrize("make", [NatureCNN, functools.partial(ImpalaResNet, filters=(4,))])
def test_image_networks_take_batches_of_any_rank(make: Any) -> None:
    network = make(spaces.Box(0, 255, (40, 40, 3), np.uint8), hidden_size=8)
    obs = torch.randint(0, 255, (2, 3, 40, 40, 3), dtype=torch.uint8)
    torch.testing.assert_close(network(obs)[1, 2], network(obs[1, 2:])[0])


def test_multi_input_gives_every_part_its_encoder() -> None:
    space = spaces.Dict(
        camera=spaces.Box(0, 255, (40, 40, 3), np.uint8), arm=spaces.Box(-1, 1, (3,)), k=spaces.Discrete(2)
    )
    network = MultiInput(space, encoders={"arm": functools.partial(MLP, hidden_sizes=(7,))}, hidden_sizes=(5,))
    kinds = {path: type(encoder).__name__ for path, encoder in network.encoders.items()}
    assert kinds == {"camera": "NatureCNN", "arm": "MLP", "k": "FlatInput"}
    assert network.layers[0].in_features == 512 + 7 + 2
    with pytest.raises(OptionError, match=r"encoders: 'leg'.*'camera'"):
        MultiInput(space, encoders={"leg": MLP})
    description = describe_network(functools.partial(MultiInput, encoders={"arm": MLP}))
    assert str(build_network(description, space)) == str(MultiInput(space, encoders={"arm": MLP}))


@pytest.mark.parametrize(
    ("space", "name"),
    [
        (spaces.Box(0, 255, (84, 84, 3), np.uint8), "NatureCNN"),
        (spaces.Box(0, 255, (10, 10, 3), np.uint8), "ImpalaResNet"),
        (spaces.Box(0, 255, (50, 50), np.uint8), "NatureCNN"),
        (spaces.Box(-1, 1, (50, 50)), "MLP"),
        (spaces.Dict(a=BOX), "MLP"),
        (spaces.Dict(a=BOX, b=spaces.Box(0, 255, (10, 10, 3), np.uint8)), "MultiInput"),
    ],
)
def test_the_default_network_suits_the_space(space: gym.Space, name: str) -> None:
    assert type(build_network(None, space)).__name__ == name


@pytest.mark.parametrize("init", ["orthogonal", "xavier_uniform", "kaiming_uniform", "torch"])
def test_mlp_weights_are_initialised_by_name(init: str) -> None:
    torch.manual_seed(0)
    layer = MLP(BOX, hidden_sizes=(200,), init=init).layers[0]
    bound = {"xavier_uniform": 2**0.5 * (6 / 205) ** 0.5, "kaiming_uniform": (6 / 5) ** 0.5, "torch": 5**-0.5}.get(init)
    if bound is None:
        torch.testing.assert_close(layer.weight.T @ layer.weight, 2 * torch.eye(5), atol=1e-5, rtol=0)
    else:
        assert 0.9 * bound < layer.weight.abs().max() <= bound
    assert (layer.bias.abs().sum() == 0) == (init != "torch")


class NoBatchOfStates(OwnNetwork):
    def initial_state(self, num_envs: int) -> torch.Tensor:
        return torch.zeros(1, 4)

    def forward(self, obs: torch.Tensor, state: torch.Tensor) -> Any:
        return super().forward(obs), state


def test_a_state_without_rows_for_environments_is_refused() -> None:
    with pytest.raises(OptionError, match=r"NoBatchOfStates: initial_state\(2\) gave {'state': \(1, 4\)}"):
        build_network(NoBatchOfStates, BOX)


def test_an_encoder_inside_of_memory_is_given_one_batch_dimension() -> None:
    class TwoDims(OwnNetwork):
        def forward(self, obs: torch.Tensor) -> torch.Tensor:
            assert obs.ndim == 2
            return super().forward(obs)

    memory = LSTMNetwork(BOX, encoder=TwoDims)
    features, _ = memory.unroll(torch.zeros(3, 4, 5), memory.initial_state(3), torch.zeros(3, 4, dtype=torch.bool))
    assert features.shape == (3, 4, 64)


@pytest.mark.parametrize("encoders", [[MLP], {"a": LSTMNetwork}])
def test_multi_input_refuses_encoders_it_cannot_use(encoders: Any) -> None:
    with pytest.raises(OptionError, match=r"^encoders"):
        MultiInput(spaces.Dict(a=BOX), encoders=encoders)


def test_too_many_classes_for_one_hot_are_refused_with_the_way_out() -> None:
    with pytest.raises(SpaceError, match="set the network's embedding_size"):
        MLP(spaces.Discrete(10**9))


def test_memory_inside_of_memory_is_refused() -> None:
    with pytest.raises(OptionError, match=r"encoder=GRUNetwork: expected a network without memory"):
        LSTMNetwork(BOX, encoder=GRUNetwork)
