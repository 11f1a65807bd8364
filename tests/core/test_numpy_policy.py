"""A policy's numpy form: the same as torch, or none."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from test_networks import NESTED
from torch import Tensor, nn

from lit_rl.networks import MLP, MultiInput
from lit_rl.normalizer import ObservationNormalizer
from lit_rl.policy import Policy
from lit_rl.policy.numpy_policy import NumpyPolicy
from lit_rl.spec import EnvSpec
from lit_rl.trees import Tree, to_torch

BOX = spaces.Box(-10, 10, (5,))
SPACES = pytest.mark.parametrize("space", [BOX, spaces.Discrete(4), spaces.Discrete(4, start=-2), NESTED], ids=str)
SPEC = EnvSpec("e", BOX, spaces.Discrete(3))


def make_policy(spec: EnvSpec = SPEC, policy_class: type[Policy] = Policy, **options: Any) -> Policy:
    torch.manual_seed(0)
    policy = policy_class(spec, **options)
    change(policy)  # biases too
    return policy


def change(policy: Policy) -> None:
    """Move every parameter, in place."""
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)


def observations(policy: Policy, batch: int = 32) -> Tree:
    space = gym.vector.utils.batch_space(policy.spec.observation_space, batch)
    space.seed(0)
    return policy.as_rows(space.sample())


def assert_acts_as_torch(policy: Policy) -> None:
    obs = observations(policy)
    with torch.no_grad():
        expected = policy(to_torch(obs))
    np.testing.assert_allclose(policy.parameters_of(obs), expected, rtol=1e-5, atol=1e-5)


@SPACES
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("hidden_sizes", [(8,), (16, 8), (4, 4, 4)], ids=str)
@pytest.mark.parametrize("layer_norm", [False, True], ids=["", "layer norm"])
def test_an_mlp_in_numpy_equals_torch(
    space: gym.Space, activation: str, hidden_sizes: Sequence[int], layer_norm: bool
) -> None:
    network = functools.partial(MLP, hidden_sizes=hidden_sizes, activation=activation, layer_norm=layer_norm)
    policy = make_policy(EnvSpec("e", space, spaces.Discrete(3)), network=network)
    assert NumpyPolicy.of(policy) is not None
    assert_acts_as_torch(policy)


def test_observations_stay_as_they_are() -> None:
    policy = make_policy()
    obs = observations(policy)
    given = obs.copy()
    policy.parameters_of(obs)
    np.testing.assert_array_equal(obs, given)


@SPACES
def test_updates_in_place_are_seen(space: gym.Space) -> None:
    policy = make_policy(EnvSpec("e", space, spaces.Box(-1, 1, (2,))))
    obs = observations(policy)
    before, twin = policy.parameters_of(obs), policy._in_numpy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.1, fused=True)
    policy(to_torch(obs)).square().sum().backward()
    optimizer.step()
    assert_acts_as_torch(policy)
    assert policy._in_numpy() is twin is not None
    assert np.abs(before - policy.parameters_of(obs)).max() > 0.1


@pytest.mark.parametrize("action_space", [spaces.Discrete(3), spaces.Box(-1, 1, (2,))], ids=str)
def test_the_numpy_form_follows_the_normaliser(action_space: gym.Space) -> None:
    policy = make_policy(EnvSpec("e", BOX, action_space), normalize_observations=True)
    assert NumpyPolicy.of(policy) is not None
    for scale in (1.0, 30.0, 0.01):  # the last makes observations that are clipped to +-10
        policy.update_normalizer(torch.randn(50, 5) * scale + scale)
        assert_acts_as_torch(policy)
    policy.normalizer.moments["/"].var.fill_(1e-6)
    assert (policy.inputs(torch.as_tensor(observations(policy))).abs() == 10).any()
    assert_acts_as_torch(policy)


def test_log_std_that_is_replaced_after_acting_is_seen() -> None:
    policy = make_policy(EnvSpec("e", BOX, spaces.Box(-1, 1, (2,))))
    policy.act(np.zeros(5))
    policy.log_std = nn.Parameter(torch.full((2,), -3.0))
    assert_acts_as_torch(policy)


@pytest.mark.parametrize("layer", ["encoder", "head"])
@pytest.mark.parametrize("how", ["parameter", "data"])
def test_parameters_that_are_replaced_after_acting_are_seen(layer: str, how: str) -> None:
    policy = make_policy()
    policy.act(np.zeros(5))
    linear = policy.head if layer == "head" else policy.encoder.layers[0]
    for name in ("weight", "bias"):
        new = torch.randn_like(getattr(linear, name))
        if how == "parameter":
            setattr(linear, name, nn.Parameter(new))
        else:
            getattr(linear, name).data = new
    assert_acts_as_torch(policy)


@pytest.mark.parametrize("name", ["encoder", "head"])
def test_layers_that_are_replaced_after_acting_are_seen(name: str) -> None:
    policy = make_policy()
    policy.act(np.zeros(5))
    setattr(policy, name, getattr(make_policy(), name))
    change(policy)
    assert_acts_as_torch(policy)


# --- policies that have no numpy form -------------------------------------------------------------------------------


class OwnForward(MLP):
    def forward(self, obs: Tree) -> Tensor:
        return super().forward(obs).square()


class NothingOfMLP(MLP):
    """Without the layers that an MLP has."""

    def __init__(self, observation_space: gym.Space):
        nn.Module.__init__(self)
        self.linear, self.output_size = nn.Linear(5, 4), 4

    def forward(self, obs: Tree) -> Tensor:
        return self.linear(obs)


class OwnInput(MLP):
    def __init__(self, observation_space: gym.Space):
        super().__init__(observation_space)
        self.input = nn.Softsign()


class Squared(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square()


class OwnLayers(MLP):
    def __init__(self, observation_space: gym.Space):
        super().__init__(observation_space)
        self.layers = Squared(*self.layers)


class OneLayer(MLP):
    def __init__(self, observation_space: gym.Space):
        super().__init__(observation_space)
        self.layers = nn.Linear(5, 64)


class OwnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square()


class LinearInside(MLP):
    def __init__(self, observation_space: gym.Space):
        super().__init__(observation_space)
        self.layers[0] = OwnLinear(5, 64)


class OwnNormalizer(ObservationNormalizer):
    def forward(self, obs: Tree, path: str = "") -> Tree:
        return super().forward(obs, path) * 2


class OwnRule(Policy):
    def rule_out(self, parameters: Tensor, obs: Tree) -> Tensor:
        return super().rule_out(parameters, obs) * 2


class OwnInputs(Policy):
    def inputs(self, obs: Tree) -> Tree:
        return super().inputs(obs) * 2


class OwnParameters(Policy):
    def action_parameters(self, features: Tensor, obs: Tree) -> Tensor:
        return super().action_parameters(features, obs) * 2


def with_head(head: nn.Module) -> Policy:
    policy = make_policy()
    policy.head = head
    return policy


def with_normalizer() -> Policy:
    policy = make_policy()
    policy.normalizer = OwnNormalizer(BOX)
    return policy


def weight_normed(find: Callable[[Policy], nn.Module], norm: Callable[[nn.Module], Any]) -> Policy:
    policy = make_policy()
    norm(find(policy))
    return policy


def hooked(find: Callable[[Policy], nn.Module], before: bool = False) -> Policy:
    policy = make_policy()
    module = find(policy)
    if before:
        module.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    else:
        module.register_forward_hook(lambda module, args, output: output * 2)
    return policy


def first_layer(policy: Policy) -> nn.Module:
    return policy.encoder.layers[0]


def head(policy: Policy) -> nn.Module:
    return policy.head


class OwnNorm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def layer_normed(norm: nn.Module) -> Policy:
    """A policy with this after its first layer."""
    policy = make_policy(network=functools.partial(MLP, layer_norm=True))
    policy.encoder.layers[1] = norm
    policy.weights_moved()
    return policy


OLD_WEIGHT_NORM = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
NO_TWIN: dict[str, Callable[[], Policy]] = {
    "elu": lambda: make_policy(network=functools.partial(MLP, activation="elu")),
    "silu": lambda: make_policy(network=functools.partial(MLP, activation="silu")),
    "layer norm without bias": lambda: layer_normed(nn.LayerNorm(64, bias=False)),
    "layer norm without parameters": lambda: layer_normed(nn.LayerNorm(64, elementwise_affine=False)),
    "layer norm of its own": lambda: layer_normed(OwnNorm(64)),
    "embeddings": lambda: make_policy(
        EnvSpec("e", spaces.Discrete(4), spaces.Discrete(3)), network=functools.partial(MLP, embedding_size=2)
    ),
    "another network": lambda: make_policy(EnvSpec("e", NESTED, spaces.Discrete(3)), network=MultiInput),
    "MLP with a forward of its own": lambda: make_policy(network=OwnForward),
    "MLP by name alone": lambda: make_policy(network=NothingOfMLP),
    "MLP with an input of its own": lambda: make_policy(network=OwnInput),
    "MLP with a Sequential of its own": lambda: make_policy(network=OwnLayers),
    "MLP of one layer": lambda: make_policy(network=OneLayer),
    "Linear of its own in the encoder": lambda: make_policy(network=LinearInside),
    "Linear of its own as head": lambda: with_head(OwnLinear(64, 3)),
    "head without bias": lambda: with_head(nn.Linear(64, 3, bias=False)),
    "another head": lambda: with_head(nn.Sequential(nn.Linear(64, 3), nn.Tanh())),
    "weight_norm in the encoder": lambda: weight_normed(first_layer, nn.utils.parametrizations.weight_norm),
    "weight_norm of the head": lambda: weight_normed(head, nn.utils.parametrizations.weight_norm),
    "weight_norm by a hook in the encoder": lambda: weight_normed(first_layer, nn.utils.weight_norm),
    "weight_norm by a hook of the head": lambda: weight_normed(head, nn.utils.weight_norm),
    "hook after the encoder": lambda: hooked(lambda policy: policy.encoder),
    "hook before the encoder": lambda: hooked(lambda policy: policy.encoder, before=True),
    "hook in the encoder": lambda: hooked(first_layer),
    "hook before the head": lambda: hooked(head, before=True),
    "normaliser of its own": with_normalizer,
    "rule_out of its own": lambda: make_policy(policy_class=OwnRule),
    "inputs of its own": lambda: make_policy(policy_class=OwnInputs),
    "action_parameters of its own": lambda: make_policy(policy_class=OwnParameters),
}


@OLD_WEIGHT_NORM
@pytest.mark.parametrize("what", NO_TWIN)
def test_a_policy_whose_numpy_form_would_differ_acts_in_torch(what: str) -> None:
    policy = NO_TWIN[what]()
    assert NumpyPolicy.of(policy) is None
    for _ in range(2):
        assert_acts_as_torch(policy)
        change(policy)


@pytest.mark.parametrize("name", ["inputs", "action_parameters", "rule_out", "choose", "draw"])
def test_a_policy_with_a_method_of_its_own_acts_by_it_in_torch(name: str) -> None:
    asked = []

    def method(self: Policy, *args: Any) -> Any:
        asked.append(args)
        return getattr(Policy, name)(self, *args)

    policy = make_policy(policy_class=type("Own", (Policy,), {name: method}))
    policy.sample(observations(policy))
    assert len(asked) == 1 and all(isinstance(x, torch.Tensor | bool) or x is policy.distribution for x in asked[0])


def test_a_policy_on_another_device_has_no_numpy_form() -> None:
    policy = make_policy()
    policy.act(np.zeros(5))
    policy.to("meta")
    assert policy._in_numpy() is None


def test_a_subclass_that_changes_the_sizes_alone_has_a_numpy_form() -> None:
    class Wide(MLP):
        def __init__(self, observation_space: gym.Space):
            super().__init__(observation_space, hidden_sizes=(128,))

    class Own(Policy):
        pass

    policy = make_policy(policy_class=Own, network=Wide)
    assert NumpyPolicy.of(policy) is not None
    assert_acts_as_torch(policy)
