"""The two halves of each action distribution, numpy and torch, against each other and torch.distributions."""

from collections.abc import Callable

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from lit_rl.distributions import (
    ActionDistribution,
    Bernoulli,
    Categorical,
    DiagonalGaussian,
    Joint,
    MultiCategorical,
    SquashedGaussian,
    distribution_for,
)
from lit_rl.errors import SpaceError
from lit_rl.masks import NEVER
from lit_rl.trees import map_tree

BOX = spaces.Box(np.array([-1.0, -2.0, 0.0], np.float32), np.array([1.0, 2.0, 0.5], np.float32))


def reference_categorical(parameters: torch.Tensor) -> torch.distributions.Distribution:
    return torch.distributions.Categorical(logits=parameters)


def reference_gaussian(parameters: torch.Tensor) -> torch.distributions.Distribution:
    mean, log_std = parameters.chunk(2, -1)
    return torch.distributions.Independent(torch.distributions.Normal(mean, log_std.exp()), 1)


def reference_multi_categorical(parameters: torch.Tensor) -> torch.distributions.Distribution:
    parts = [torch.distributions.Categorical(logits=logits) for logits in parameters.split([2, 4, 3], -1)]
    return Together(parts)


def reference_bernoulli(parameters: torch.Tensor) -> torch.distributions.Distribution:
    return torch.distributions.Independent(torch.distributions.Bernoulli(logits=parameters), 1)


class Together:
    """Independent choices, one per column."""

    def __init__(self, parts: list[torch.distributions.Distribution]):
        self.parts = parts

    def sample(self) -> torch.Tensor:
        return torch.stack([part.sample() for part in self.parts], -1)

    def log_prob(self, action: torch.Tensor) -> torch.Tensor:
        return sum(part.log_prob(column) for part, column in zip(self.parts, action.unbind(-1)))

    def entropy(self) -> torch.Tensor:
        return sum(part.entropy() for part in self.parts)


MULTI = spaces.MultiDiscrete([2, 4, 3], start=[0, 1, -1])
EVERY = pytest.mark.parametrize(
    ("distribution", "reference"),
    [
        (Categorical(5), reference_categorical),
        (DiagonalGaussian(BOX), reference_gaussian),
        (MultiCategorical(MULTI), reference_multi_categorical),
        (Bernoulli(spaces.MultiBinary(4)), reference_bernoulli),
    ],
    ids=["Categorical", "DiagonalGaussian", "MultiCategorical", "Bernoulli"],
)


def random_parameters(distribution: ActionDistribution, batch: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((batch, distribution.num_outputs + distribution.num_scales)).astype(np.float32)


def test_categorical_samples_as_often_as_softmax_says() -> None:
    logits = np.array([0.0, 1.0, -2.0, 3.0, 0.5], np.float32)
    probability = np.exp(logits) / np.exp(logits).sum()
    n = 50_000
    action, _ = Categorical(5).sample(np.tile(logits, (n, 1)), np.random.default_rng(0))
    frequency = np.bincount(action, minlength=5) / n
    assert (np.abs(frequency - probability) < 4 * np.sqrt(probability * (1 - probability) / n)).all()


def test_gaussian_samples_have_its_mean_and_standard_deviation() -> None:
    mean, std, n = np.array([0.5, -1.0, 3.0]), np.array([0.1, 1.0, 2.0]), 50_000
    parameters = np.tile(np.concatenate([mean, np.log(std)]).astype(np.float32), (n, 1))
    action, _ = DiagonalGaussian(BOX).sample(parameters, np.random.default_rng(0))
    assert (np.abs(action.mean(0) - mean) < 4 * std / np.sqrt(n)).all()
    assert (np.abs(action.std(0) / std - 1) < 4 / np.sqrt(2 * n)).all()


@EVERY
def test_log_prob_of_a_numpy_sample_equals_torch(distribution: ActionDistribution, reference: Callable) -> None:
    parameters = random_parameters(distribution, 500)
    action, log_prob = distribution.sample(parameters, np.random.default_rng(1))
    log_prob_torch, _ = distribution.evaluate(torch.as_tensor(parameters), torch.as_tensor(action))
    torch.testing.assert_close(torch.as_tensor(log_prob), log_prob_torch, atol=1e-5, rtol=0)


@EVERY
def test_evaluate_equals_torch_distributions(distribution: ActionDistribution, reference: Callable) -> None:
    parameters = torch.as_tensor(random_parameters(distribution, 500)).double()
    expected = reference(parameters)
    action = expected.sample()
    log_prob, entropy = distribution.evaluate(parameters, action)
    torch.testing.assert_close(log_prob, expected.log_prob(action))
    torch.testing.assert_close(entropy, expected.entropy())


@EVERY
def test_kl_equals_torch_distributions(distribution: ActionDistribution, reference: Callable) -> None:
    first, second = (torch.as_tensor(random_parameters(distribution, 500, seed)).double() for seed in (0, 1))
    p, q = (reference(x) for x in (first, second))
    pairs = zip(p.parts, q.parts) if isinstance(p, Together) else [(p, q)]
    expected = sum(torch.distributions.kl_divergence(*pair) for pair in pairs)
    torch.testing.assert_close(distribution.kl(first, second), expected)
    assert not distribution.kl(first, first).any()


def test_kl_of_squashed_gaussians_is_that_of_their_samples() -> None:
    squashed = SquashedGaussian(BOX)
    first, second = (torch.as_tensor(random_parameters(squashed, 1, seed)).double() for seed in (0, 1))
    noise = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    action, log_prob = squashed.rsample(first.expand(len(noise), -1), noise)
    log_ratio = log_prob - squashed.evaluate(second.expand(len(noise), -1), action)[0]
    found = squashed.kl(first, second)
    assert abs(log_ratio.mean() - found) < 4 * log_ratio.std() / len(noise) ** 0.5
    wide = torch.full((1, 6), 9.0)  # log standard deviations end at 2
    assert squashed.kl(wide, torch.cat([wide[:, :3], torch.full((1, 3), 2.0)], -1)) == 0


def test_kl_of_masked_choices_is_finite_with_its_gradient() -> None:
    first, second = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
    legal = torch.tensor([True, False, True, True, False])
    masked = [x.masked_fill(~legal, NEVER).requires_grad_() for x in (first, second)]
    found = Categorical(5).kl(*masked)
    torch.testing.assert_close(found, Categorical(3).kl(first[:, legal], second[:, legal]))
    for gradient in torch.autograd.grad(found.sum(), masked):
        assert gradient.isfinite().all() and not gradient[:, ~legal].any()


@EVERY
def test_evaluate_takes_rollouts_and_sends_gradients_to_the_parameters(
    distribution: ActionDistribution, reference: Callable
) -> None:
    parameters = torch.as_tensor(random_parameters(distribution, 12)).reshape(3, 4, -1).requires_grad_()
    log_prob, entropy = distribution.evaluate(parameters, reference(parameters).sample())
    assert log_prob.shape == entropy.shape == (3, 4)
    for term in (log_prob, entropy):
        (gradient,) = torch.autograd.grad(term.sum(), parameters, retain_graph=True)
        assert gradient.isfinite().all() and gradient.abs().sum() > 0


class Edges:
    """A generator that gives the ends of [0, 1), where inverse CDFs go wrong."""

    def random(self, n: int) -> np.ndarray:
        return np.resize([0.0, np.nextafter(1.0, 0.0)], n)


@pytest.mark.parametrize("rng", [np.random.default_rng(0), Edges()], ids=["random", "edges"])
@pytest.mark.parametrize("impossible", [[0], [4], [0, 4], [0, 1, 2, 4], [1, 2, 3]])
def test_categorical_never_samples_an_action_of_probability_zero(
    rng: np.random.Generator, impossible: list[int]
) -> None:
    logits = random_parameters(Categorical(5), 2000) * 3
    logits[::2, impossible] = -np.inf
    logits[1::2, impossible] = -1e9
    action, log_prob = Categorical(5).sample(logits, rng)
    assert not np.isin(action, impossible).any()
    assert np.isfinite(log_prob).all()


def test_categorical_survives_large_logits() -> None:
    action, log_prob = Categorical(3).sample(np.array([[1e4, 0.0, -1e4]], np.float32), np.random.default_rng(0))
    assert (action.tolist(), log_prob.tolist()) == ([0], [0.0])


def test_mode_is_the_most_probable_action() -> None:
    assert Categorical(3).mode(np.array([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])).tolist() == [1, 0]
    parameters = np.array([[1.0, 2.0, 3.0, -1.0, -1.0, -1.0]])
    assert DiagonalGaussian(BOX).mode(parameters).tolist() == [[1.0, 2.0, 3.0]]


def test_discrete_start_is_added_for_the_environment_only() -> None:
    space = spaces.Discrete(3, start=-1)
    distribution = distribution_for(space)
    parameters = random_parameters(distribution, 200)
    action, _ = distribution.sample(parameters, np.random.default_rng(0))
    assert set(action) == {0, 1, 2}  # recorded from 0, as losses index logits
    assert set(distribution.to_env(action)) == {-1, 0, 1}
    assert all(space.contains(a) for a in distribution.to_env(action))


def test_box_actions_are_clipped_for_the_environment_only() -> None:
    distribution = distribution_for(BOX)
    action, _ = distribution.sample(random_parameters(distribution, 200), np.random.default_rng(0))
    recorded = action.copy()
    given = distribution.to_env(action)
    assert all(BOX.contains(a) for a in given)
    np.testing.assert_array_equal(given, np.clip(recorded, BOX.low, BOX.high))
    assert (given != recorded).any()
    np.testing.assert_array_equal(action, recorded)  # not clipped in place


@pytest.mark.parametrize(
    "space",
    [
        spaces.Text(4),
        spaces.Box(-1, 1, ()),
        spaces.Box(0, 255, (3,), np.uint8),
        spaces.Dict(),
    ],
    ids=str,
)
def test_unsupported_action_space_is_named_in_the_error(space: gym.Space) -> None:
    with pytest.raises(SpaceError) as error:
        distribution_for(space)
    assert str(space) in str(error.value)


NESTED = spaces.Dict(
    b=spaces.Box(-1, 1, (2,)), a=spaces.Tuple([spaces.Discrete(3, start=1), MULTI]), c=spaces.Box(0, 1, (1, 2))
)


def test_joint_log_prob_and_entropy_are_the_sums_of_the_parts() -> None:
    joint = distribution_for(NESTED)
    assert isinstance(joint, Joint) and (joint.num_outputs, joint.num_scales) == (2 + 3 + 9 + 2, 4)
    parameters = random_parameters(joint, 200)
    action, log_prob = joint.sample(parameters, np.random.default_rng(1))
    tensor = torch.as_tensor(parameters)
    # outputs: b's means, a's logits, c's means; then the log standard deviations of b and of c
    gaussians = [tensor[:, [0, 1, 16, 17]], tensor[:, [14, 15, 18, 19]]]
    values = [torch.as_tensor(action["b"]), torch.as_tensor(action["c"]).flatten(1)]
    expected = sum(reference_gaussian(p).log_prob(v) for p, v in zip(gaussians, values))
    expected += reference_categorical(tensor[:, 2:5]).log_prob(torch.as_tensor(action["a"]["0"]))
    expected += reference_multi_categorical(tensor[:, 5:14]).log_prob(torch.as_tensor(action["a"]["1"]))
    entropy = sum(reference_gaussian(p).entropy() for p in gaussians)
    entropy += reference_categorical(tensor[:, 2:5]).entropy() + reference_multi_categorical(tensor[:, 5:14]).entropy()
    torch.testing.assert_close(torch.as_tensor(log_prob), expected, atol=1e-5, rtol=1e-5)
    evaluated = joint.evaluate(tensor, map_tree(torch.as_tensor, action))
    torch.testing.assert_close(evaluated[0], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(evaluated[1], entropy, atol=1e-5, rtol=1e-5)


def test_joint_kl_is_the_sum_of_the_parts() -> None:
    joint = distribution_for(NESTED)
    first, second = (torch.as_tensor(random_parameters(joint, 20, seed)) for seed in (0, 1))
    gaussians, multi = [[0, 1, 16, 17], [14, 15, 18, 19]], MultiCategorical(MULTI)
    box = DiagonalGaussian(spaces.Box(-1, 1, (2,)))
    expected = sum(box.kl(first[:, at], second[:, at]) for at in gaussians)
    expected += Categorical(3).kl(first[:, 2:5], second[:, 2:5]) + multi.kl(first[:, 5:14], second[:, 5:14])
    torch.testing.assert_close(joint.kl(first, second), expected)


def test_joint_actions_reach_the_environment_in_its_own_form() -> None:
    joint = distribution_for(NESTED)
    for make in (joint.mode, lambda p: joint.sample(p * 5, np.random.default_rng(0))[0]):
        action = map_tree(lambda x: x[0], make(random_parameters(joint, 1)))
        given = joint.to_env(action)
        assert isinstance(given["a"], tuple) and NESTED.contains(given | {"a": given["a"]})


def test_the_choices_of_a_joint_distribution_are_where_its_logits_are() -> None:
    assert distribution_for(NESTED).choices == [slice(2, 5), slice(5, 7), slice(7, 11), slice(11, 14)]


def test_bernoulli_flips_as_often_as_the_sigmoid_says() -> None:
    logits, n = np.array([-2.0, 0.0, 1.0], np.float32), 50_000
    ones, _ = Bernoulli(spaces.MultiBinary(3)).sample(np.tile(logits, (n, 1)), np.random.default_rng(0))
    probability = 1 / (1 + np.exp(-logits))
    assert (np.abs(ones.mean(0) - probability) < 4 * np.sqrt(probability * (1 - probability) / n)).all()


@pytest.mark.parametrize("space", [MULTI, spaces.MultiBinary([2, 2]), spaces.MultiDiscrete([[2, 3], [4, 5]])], ids=str)
def test_actions_of_any_shape_are_in_their_space(space: gym.Space) -> None:
    distribution = distribution_for(space)
    parameters = random_parameters(distribution, 6)
    for action in (distribution.mode(parameters), distribution.sample(parameters, np.random.default_rng(0))[0]):
        assert action.shape == (6, *space.shape)
        assert all(space.contains(distribution.to_env(row)) for row in action)


@pytest.mark.parametrize("squash", [False, True])
def test_what_the_environment_took_is_recorded_again_as_it_was(squash: bool) -> None:
    space = spaces.Dict(
        arm=BOX,
        rest=spaces.Tuple(
            [spaces.Discrete(3, start=-1), spaces.MultiDiscrete([2, 3], start=[1, 0]), spaces.MultiBinary(2)]
        ),
    )
    distribution, rng = distribution_for(space, squash=squash), np.random.default_rng(0)
    parameters = rng.normal(size=(50, distribution.num_outputs + distribution.num_scales)).astype(np.float32)
    action, _ = distribution.sample(parameters, rng)
    taken = distribution.to_env(action)
    again = distribution.from_env({"arm": taken["arm"], "rest": dict(zip("012", taken["rest"]))})
    if not squash:  # the environment was given it clipped
        action["arm"] = np.clip(action["arm"], BOX.low, BOX.high)
    for found, expected in ((again["arm"], action["arm"]), *((again["rest"][i], action["rest"][i]) for i in "012")):
        assert found.dtype.kind == expected.dtype.kind and found.shape == expected.shape
        np.testing.assert_allclose(found, expected, atol=1e-6)
    assert again["arm"].dtype == np.float32
    if squash:
        low, high = distribution.from_env({"arm": np.stack([BOX.low - 1, BOX.high]), "rest": again["rest"]})["arm"]
        np.testing.assert_array_equal([low, high], [[-1, -1, -1], [1, 1, 1]])
