"""Box actions kept inside by a tanh: what is recorded, evaluated and given to the environment where it saturates."""

import numpy as np
import pytest
import torch
from gymnasium import spaces

from lit_rl.distributions import SquashedGaussian, distribution_for
from lit_rl.trees import to_torch

UNIT = spaces.Box(-1, 1, (1,), np.float32)


@pytest.mark.parametrize(("mean", "log_std"), [(0, 0), (7, 0), (8, 0), (-10, 0), (0, 2), (10, -3)])
@pytest.mark.parametrize("space", [UNIT, spaces.Dict({"a": UNIT})])
def test_recorded_and_recomputed_log_probabilities_agree_where_the_tanh_saturates(space, mean, log_std) -> None:
    distribution = distribution_for(space, squash=True)
    parameters = np.tile(np.array([mean, log_std], np.float32), (20_000, 1))
    action, log_prob = distribution.sample(parameters, np.random.default_rng(0))
    found = distribution.evaluate(torch.from_numpy(parameters), to_torch(action))[0]
    assert np.abs(found.numpy() - log_prob).max() < 1e-5  # before: up to 574, and 97 % of rows beyond a clip of 0.2


def test_the_recorded_log_probability_is_that_of_an_exact_inverse_where_there_is_one() -> None:
    parameters = np.random.default_rng(0).normal(scale=0.5, size=(1000, 2)).astype(np.float32)
    action, log_prob = SquashedGaussian(UNIT).sample(parameters, np.random.default_rng(1))
    u = np.arctanh(action.astype(np.float64))[:, 0]
    mean, std = parameters[:, 0], np.exp(parameters[:, 1])
    expected = -0.5 * ((u - mean) / std) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi) - np.log(1 - np.tanh(u) ** 2)
    np.testing.assert_allclose(log_prob, expected, atol=1e-4)


def test_squashed_actions_stay_in_the_space_where_scaling_rounds_outside() -> None:
    rng, ends = np.random.default_rng(0), np.array([[-1.0], [1.0]], np.float32)
    low = rng.normal(size=5000).astype(np.float32)
    bounds = [(-0.7, 1.3), (-0.3, 0.9), *zip(low, low + rng.exponential(size=5000).astype(np.float32))]
    spaces_ = [spaces.Box(np.float32(a), np.float32(b), (1,), np.float32) for a, b in bounds]
    outside = [space for space in spaces_ for a in SquashedGaussian(space).to_env(ends) if not space.contains(a)]
    assert not outside
    assert SquashedGaussian(spaces_[0]).to_env(ends).tolist() == [[np.float32(-0.7)], [np.float32(1.3)]]
    joint = distribution_for(spaces.Tuple([spaces_[0], UNIT]), squash=True)
    assert spaces_[0].contains(joint.to_env({"0": ends[0], "1": ends[0]})[0])
