"""Bounds of Box actions that are no bounds: the largest numbers of a data type."""

import numpy as np
import pytest
from gymnasium import spaces

from lit_rl.distributions import DiagonalGaussian, SquashedGaussian, distribution_for
from lit_rl.errors import SpaceError

LARGEST = float(np.finfo(np.float32).max)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-LARGEST, LARGEST, (1,)),
        spaces.Box(0, LARGEST, (1,)),
        spaces.Box(np.array([-1.0, -LARGEST / 2]), np.ones(2), dtype=np.float64),
        spaces.Box(-np.finfo(np.float64).max, np.finfo(np.float64).max, (1,), np.float64),
        spaces.Box(-np.inf, np.inf, (1,)),
        spaces.Tuple([spaces.Discrete(2), spaces.Box(-LARGEST, LARGEST, (1,))]),
    ],
    ids=str,
)
def test_actions_are_not_squashed_between_the_largest_numbers(space: spaces.Space) -> None:
    with pytest.raises(SpaceError, match="has no bounds"):
        distribution_for(space, squash=True)


@pytest.mark.parametrize("bounds", [(-LARGEST, LARGEST), (0, LARGEST), (-np.inf, np.inf)])
def test_random_actions_between_the_largest_numbers_are_those_without_bounds(bounds: tuple[float, float]) -> None:
    distribution = DiagonalGaussian(spaces.Box(*bounds, (1,)))
    actions = distribution.to_env(distribution.uniform(np.ones((1000, 1)), np.random.default_rng(0)))
    assert np.abs(actions).max() < 10


def test_the_largest_bounds_of_a_short_data_type_are_bounds() -> None:
    distribution = SquashedGaussian(spaces.Box(-65504, 65504, (1,), np.float16))
    assert distribution.to_env(np.array([[-1.0], [0.0], [1.0]], np.float32)).tolist() == [[-65504], [0], [65504]]
