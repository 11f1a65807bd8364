"""The policy as people and env runners use it."""

import copy
import functools
import io
import json
import pickle
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from test_networks import OwnNetwork
from torch import nn

from lit_rl.distributions import DiagonalGaussian
from lit_rl.errors import CheckpointError, OptionError, SpaceError
from lit_rl.files.checkpoint import check_plain
from lit_rl.networks import MLP
from lit_rl.policy import Policy
from lit_rl.spec import EnvSpec

BOX = spaces.Box(-1, 1, (4,))
LOW_ACTIONS = spaces.Box(-0.5, 0.25, (2,))
SPECS = {
    "box to discrete": EnvSpec("e", BOX, spaces.Discrete(3)),
    "box to shifted discrete": EnvSpec("e", BOX, spaces.Discrete(3, start=5)),
    "box to box": EnvSpec("e", BOX, LOW_ACTIONS),
    "discrete to discrete": EnvSpec("e", spaces.Discrete(6), spaces.Discrete(3)),
    "shifted discrete to box": EnvSpec("e", spaces.Discrete(6, start=2), LOW_ACTIONS),
}
EVERY_SPEC = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def make_policy(spec: EnvSpec, **kwargs: Any) -> Policy:
    """A policy that acts differently on different observations."""
    torch.manual_seed(0)
    policy = Policy(spec, **kwargs)
    nn.init.normal_(policy.head.weight)
    if policy.normalizer is not None:
        policy.update_normalizer(torch.randn(100, 4) * 3 + 1)
    return policy


def observations(spec: EnvSpec, batch: int = 16) -> np.ndarray:
    spec.observation_space.seed(0)
    return np.array([spec.observation_space.sample() for _ in range(batch)])


@EVERY_SPEC
@pytest.mark.parametrize("as_torch", [False, True], ids=["numpy", "torch"])
def test_act_gives_the_space_s_actions_for_one_observation_and_a_batch(spec: EnvSpec, as_torch: bool) -> None:
    policy, obs = make_policy(spec), observations(spec)
    batch, state = policy.act(torch.as_tensor(obs) if as_torch else obs)
    assert state is None
    assert isinstance(batch, torch.Tensor if as_torch else np.ndarray)
    assert tuple(batch.shape) == (16, *spec.action_space.shape)
    assert len(np.unique(np.asarray(batch), axis=0)) > 1
    for row, action in zip(obs, np.asarray(batch)):
        assert spec.action_space.contains(action)
        single, _ = policy.act(torch.as_tensor(row) if as_torch else row)
        assert isinstance(single, torch.Tensor) == as_torch
        np.testing.assert_allclose(single, action, rtol=1e-5, atol=1e-6)


def test_act_takes_a_plain_number_where_the_space_is_discrete() -> None:
    policy = make_policy(SPECS["discrete to discrete"])
    assert policy.act(4)[0] == policy.act(np.array([4]))[0][0]


def test_act_takes_float64_observations_as_env_s_give_them() -> None:
    policy = make_policy(SPECS["box to box"])
    obs = observations(policy.spec)
    np.testing.assert_array_equal(policy.act(obs.astype(np.float64))[0], policy.act(obs)[0])


@pytest.mark.parametrize("shape", [(), (3,), (5,), (16, 3), (2, 16, 4), (4, 1), (1, 2, 4)], ids=str)
def test_act_refuses_an_observation_of_another_shape_and_names_both(shape: tuple[int, ...]) -> None:
    with pytest.raises(OptionError) as error:
        make_policy(SPECS["box to discrete"]).act(np.zeros(shape, np.float32))
    assert all(text in str(error.value) for text in (str(shape), "(4,)", "(B, 4)"))


@EVERY_SPEC
def test_deterministic_actions_repeat_and_are_the_mode(spec: EnvSpec) -> None:
    policy, obs = make_policy(spec), observations(spec)
    first, second = policy.act(obs)[0], policy.act(obs)[0]
    np.testing.assert_array_equal(first, second)
    mode = policy.distribution.mode(policy.parameters_of(obs))
    np.testing.assert_array_equal(first, policy.to_env(mode))


@EVERY_SPEC
def test_random_actions_differ_and_follow_the_policy_s_generator(spec: EnvSpec) -> None:
    policy, obs = make_policy(spec), np.repeat(observations(spec, 1), 64, 0)
    policy.rng = np.random.default_rng(0)
    first, second = (policy.act(obs, deterministic=False)[0] for _ in range(2))
    assert (first != second).any()
    policy.rng = np.random.default_rng(0)
    np.testing.assert_array_equal(policy.act(obs, deterministic=False)[0], first)
    assert all(spec.action_space.contains(action) for action in first)


@EVERY_SPEC
def test_recorded_log_probs_equal_the_learner_s(spec: EnvSpec) -> None:
    policy, obs = make_policy(spec), observations(spec)
    action, log_prob, state = policy.sample(obs, policy.initial_state(len(obs)))
    assert state is None
    batch = {"observation": torch.as_tensor(obs), "action": torch.as_tensor(action)}
    evaluated, entropy = policy.evaluate(batch)
    torch.testing.assert_close(torch.as_tensor(log_prob), evaluated.detach(), atol=1e-5, rtol=1e-5)
    assert entropy.shape == (16,)


def test_samples_are_recorded_unclipped_and_given_clipped() -> None:
    policy = make_policy(SPECS["box to box"])
    action, _, _ = policy.sample(observations(policy.spec))
    assert not all(LOW_ACTIONS.contains(a) for a in action)
    assert all(LOW_ACTIONS.contains(a) for a in policy.to_env(action))


def test_every_parameter_gets_a_gradient_from_the_log_prob() -> None:
    for spec in SPECS.values():
        policy, obs = make_policy(spec), observations(spec)
        action, _, _ = policy.sample(obs)
        log_prob, _ = policy.evaluate({"observation": torch.as_tensor(obs), "action": torch.as_tensor(action)})
        log_prob.square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.parameters())


DESCRIBED = [(spec, {}) for spec in SPECS.values()] + [
    (SPECS["box to box"], {"normalize_observations": True}),
    (SPECS["box to discrete"], {"network": functools.partial(MLP, hidden_sizes=(8,), activation="relu")}),
]


@pytest.mark.parametrize(("spec", "kwargs"), DESCRIBED)
def test_described_policy_with_its_weights_acts_the_same(spec: EnvSpec, kwargs: dict[str, Any]) -> None:
    policy, obs = make_policy(spec, **kwargs), observations(spec)
    description = policy.describe()
    check_plain(description, "description")
    rebuilt = Policy.from_description(json.loads(json.dumps(description)))
    rebuilt.load_weights(policy.state_dict())
    np.testing.assert_array_equal(rebuilt.act(obs)[0], policy.act(obs)[0])
    assert rebuilt.describe() == description


def test_described_policy_with_a_network_of_ones_own_needs_it() -> None:
    policy, obs = make_policy(SPECS["box to box"], network=OwnNetwork), observations(SPECS["box to box"])
    with pytest.raises(CheckpointError, match=r"OwnNetwork.*network="):
        Policy.from_description(policy.describe())
    rebuilt = Policy.from_description(policy.describe(), network=OwnNetwork)
    rebuilt.load_weights(policy.state_dict())
    np.testing.assert_array_equal(rebuilt.act(obs)[0], policy.act(obs)[0])


def test_weights_of_another_network_are_refused_with_the_way_out() -> None:
    policy = make_policy(SPECS["box to box"])
    other = make_policy(SPECS["box to box"], network=functools.partial(MLP, hidden_sizes=(8,)))
    with pytest.raises(CheckpointError, match=r"do not fit.*MLP.*network="):
        policy.load_weights(other.state_dict())


@pytest.mark.parametrize("copied_by", ["pickle", "deepcopy", "torch.save"])
def test_policy_that_has_acted_can_be_copied_and_the_copy_is_its_own(copied_by: str) -> None:
    policy = make_policy(SPECS["box to box"], normalize_observations=True)
    obs = observations(policy.spec)
    before, _ = policy.act(obs)
    if copied_by == "deepcopy":
        copied = copy.deepcopy(policy)
    elif copied_by == "pickle":
        copied = pickle.loads(pickle.dumps(policy))
    else:
        file = io.BytesIO()
        torch.save(policy, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    np.testing.assert_array_equal(copied.act(obs)[0], before)
    with torch.no_grad():
        policy.head.bias.add_(0.1)
    assert (policy.act(obs)[0] != before).any()
    np.testing.assert_array_equal(copied.act(obs)[0], before)


def test_policy_that_has_acted_acts_with_weights_loaded_later() -> None:
    policy, other = (make_policy(SPECS["box to box"], normalize_observations=True) for _ in range(2))
    obs = observations(policy.spec)
    policy.act(obs)
    with torch.no_grad():
        other.head.weight.mul_(-1.0)
        other.normalizer.moments["/"].var.mul_(2.0)
    policy.load_weights(other.state_dict())
    np.testing.assert_array_equal(policy.act(obs)[0], other.act(obs)[0])


def test_policy_that_has_acted_follows_a_change_of_dtype() -> None:
    policy, obs = make_policy(SPECS["box to discrete"]), observations(SPECS["box to discrete"])
    before, _ = policy.act(obs)
    np.testing.assert_array_equal(policy.double().act(obs)[0], before)


def test_the_first_policy_is_close_to_uniform() -> None:
    torch.manual_seed(0)
    policy = Policy(SPECS["box to discrete"])
    _, entropy = policy.evaluate({"observation": torch.randn(100, 4), "action": torch.zeros(100, dtype=torch.int64)})
    assert entropy.min() > 0.999 * np.log(3)


def test_normalised_observations_are_standardised_and_clipped() -> None:
    policy = make_policy(SPECS["box to box"])
    assert policy.normalizer is None
    obs = torch.randn(200, 4) * 5 + 3
    assert policy.inputs(obs) is obs
    policy = Policy(SPECS["box to box"], normalize_observations=True)
    policy.update_normalizer(obs)
    normalized = policy.inputs(obs)
    torch.testing.assert_close(normalized.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(normalized.std(0, correction=0), torch.ones(4))
    assert policy.inputs(obs * 100).abs().max() == 10


def test_normalising_discrete_observations_is_refused() -> None:
    with pytest.raises(OptionError, match=r"normalize_observations=True.*Discrete\(6\)"):
        Policy(SPECS["discrete to discrete"], normalize_observations=True)


@pytest.mark.parametrize(
    "spec",
    [EnvSpec("e", BOX, spaces.Text(2)), EnvSpec("e", spaces.Text(3), spaces.Discrete(2))],
    ids=["action", "observation"],
)
def test_policy_refuses_unsupported_spaces(spec: EnvSpec) -> None:
    with pytest.raises(SpaceError, match=r"not supported|default network"):
        Policy(spec)


def test_a_user_s_image_network_acts_in_torch() -> None:
    space = spaces.Box(0, 255, (8, 8, 3), np.uint8)

    class Flat(nn.Module):
        output_size = 16

        def __init__(self, observation_space: gym.Space):
            super().__init__()
            self.layers = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU())

        def forward(self, obs: torch.Tensor) -> torch.Tensor:
            return self.layers(obs / 255)

    policy = make_policy(EnvSpec("e", space, LOW_ACTIONS), network=Flat)
    assert isinstance(policy.distribution, DiagonalGaussian)
    obs = observations(policy.spec)
    np.testing.assert_allclose(policy.act(obs[3])[0], policy.act(obs)[0][3], rtol=1e-5, atol=1e-6)


def test_replaced_weights_are_seen_after_acting() -> None:
    policy, other = (Policy(EnvSpec("x", spaces.Box(-1, 1, (4,)), spaces.Discrete(3))) for _ in range(2))
    obs = np.ones((2, 4), np.float32)
    policy.act(obs)
    other.head.weight.data.normal_()
    policy.load_state_dict(other.state_dict(), assign=True)
    np.testing.assert_allclose(policy.parameters_of(obs), other.parameters_of(obs))
    policy.head = torch.nn.Linear(64, 3)
    with torch.no_grad():
        np.testing.assert_allclose(policy.parameters_of(obs), policy(torch.as_tensor(obs)).numpy(), atol=1e-6)


@pytest.mark.parametrize("obs", [0, 5, [1, 9]])
def test_a_discrete_observation_outside_its_space_is_refused(obs: object) -> None:
    policy = Policy(EnvSpec("x", spaces.Discrete(4, start=1), spaces.Discrete(3)))
    with pytest.raises(OptionError, match="expected whole numbers in Discrete"):
        policy.act(np.asarray(obs))


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float64])
def test_a_box_of_any_number_type_is_acted_on_and_evaluated_alike(dtype: type) -> None:
    space = spaces.Box(0, 9, (4,), dtype)
    policy = Policy(EnvSpec("x", space, spaces.Discrete(3)), normalize_observations=True)
    obs = np.stack([space.sample() for _ in range(5)])
    action, log_prob, _ = policy.sample(obs)
    batch = {"observation": torch.as_tensor(obs), "action": torch.as_tensor(action)}
    np.testing.assert_allclose(policy.evaluate(batch)[0].detach(), log_prob, atol=1e-6)


NESTED = spaces.Dict(
    image=spaces.Box(0, 255, (4, 4, 1), np.uint8),
    pair=spaces.Tuple([spaces.Discrete(3, start=1), spaces.MultiDiscrete([2, 2])]),
    speed=spaces.Box(-1, 1, (2,)),
)


def nested_observation(**changes: Any) -> dict[str, Any]:
    good = {"image": np.zeros((4, 4, 1), np.uint8), "pair": (1, [0, 1]), "speed": [0.0, 1.0]}
    return {key: value for key, value in (good | changes).items() if value is not ...}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"speed": ...}, "obs has no 'speed': expected a dict with the keys"),
        ({"pair": (1,)}, "obs['pair'] is 1 parts: expected a tuple of 2 parts"),
        ({"pair": None}, "obs['pair'] is a NoneType: expected a tuple of 2 parts"),
        ({"pair": (0, [0, 1])}, "obs['pair/0']"),
        ({"pair": (1.5, [0, 1])}, "obs['pair'][0]=1.5: expected whole numbers"),
        ({"pair": (1, [0, 2])}, "obs['pair/1']"),
        ({"image": np.full((4, 4, 1), 0.5)}, "obs['image']=[[[0.5], [0.5],"),
        ({"image": np.ones((4, 4, 1))}, "expected whole numbers from 0 to 255"),
        ({"image": np.full((4, 4, 1), 256)}, "expected whole numbers from 0 to 255"),
        ({"image": np.full((4, 4, 1), -1)}, "expected whole numbers from 0 to 255"),
        ({"speed": [np.nan, 0.0]}, "obs['speed']=[nan, 0.0]: expected finite numbers"),
        ({"speed": ["1", "2"]}, "obs['speed']=['1', '2']: expected numbers"),
        ({"speed": [0.0]}, "obs['speed'] has shape (1,): expected (2,), or (B, 2)"),
        ({"speed": [[0.0, 0.0]]}, "obs: its parts hold different numbers of observations"),
    ],
    ids=str,
)
def test_a_nested_observation_that_is_not_one_is_told_which_part(changes: dict[str, Any], words: str) -> None:
    policy = Policy(EnvSpec("e", NESTED, spaces.Discrete(2)))
    policy.act(nested_observation())
    with pytest.raises(OptionError) as error:
        policy.act(nested_observation(**changes))
    given = str(error.value)
    assert words in given and len(given) < 400 and "\n" not in given


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(OptionError, match="holds no observation"):
        Policy(SPECS["box to box"]).act(np.zeros((0, 4)))


def test_actions_of_half_precision_are_in_their_space() -> None:
    space = spaces.Box(-1, 1, (2,), np.float16)
    action, _ = Policy(EnvSpec("e", BOX, space)).act(np.zeros(4))
    assert space.contains(action)


class Broken(Policy):
    """Chooses and evaluates as `how` says."""

    how = ""

    def choose(self, features: torch.Tensor, obs: Any, deterministic: bool) -> Any:
        action, log_prob = super().choose(features, obs, deterministic)
        if self.how == "scalar":
            return action, log_prob.sum()
        return {"lacking part": ({"a": action["a"]}, log_prob)}.get(self.how, (action, log_prob))

    def evaluate_actions(self, features: torch.Tensor, obs: Any, action: Any) -> Any:
        log_prob, entropy = super().evaluate_actions(features, obs, action)
        return (log_prob.sum(), entropy) if self.how == "evaluates a scalar" else (log_prob, entropy)


@pytest.mark.parametrize("how", ["scalar", "lacking part", "evaluates a scalar"])
def test_an_own_policy_that_gives_wrong_shapes_is_refused(how: str) -> None:
    spec = EnvSpec("e", BOX, spaces.Dict(a=spaces.Discrete(2), b=spaces.Discrete(2)))
    policy = Broken(spec)
    obs = np.zeros((3, 4), np.float32)
    action, *_ = policy.step(obs)
    batch = {"observation": torch.as_tensor(obs), "action": {k: torch.as_tensor(v) for k, v in action.items()}}
    policy.evaluate(batch)
    policy.how = how
    with pytest.raises(OptionError, match=r"policy_class=Broken: .*expected"):
        policy.evaluate(batch) if how.startswith("evaluates") else policy.step(obs)


def test_a_policy_class_of_another_name_is_refused_at_loading() -> None:
    class Other(Policy):
        pass

    with pytest.raises(CheckpointError, match=r"policy_class=test_policy:Broken, not"):
        Other.from_description(Broken(SPECS["box to box"]).describe())


def test_an_own_class_that_is_called_policy_too_is_not_taken_for_lit_rl_s() -> None:
    own = type("Policy", (Policy,), {"__module__": "mine", "__qualname__": "Policy"})
    with pytest.raises(CheckpointError, match=r"policy_class=mine:Policy, not Policy"):
        Policy.from_description(own(SPECS["box to box"]).describe())
