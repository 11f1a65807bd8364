"""Specs as plain data."""

import json

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from lit_rl.errors import SpaceError
from lit_rl.files.checkpoint import check_plain
from lit_rl.spec import EnvSpec, space_from_dict, space_to_dict

SPACES = [
    spaces.Discrete(4),
    spaces.Discrete(3, start=-1),
    spaces.Box(-1.0, 1.0, (3,)),
    spaces.Box(-np.inf, np.inf, (2,), np.float64),
    spaces.Box(np.array([0.0, -np.inf], np.float32), np.array([1.0, 2.5], np.float32)),
    spaces.Box(0, 255, (4, 4, 3), np.uint8),
    spaces.Box(-5, 5, (2, 2), np.int32),
    spaces.Box(0.1, 0.3, ()),
    spaces.Box(0, 1, (0,)),
    spaces.MultiDiscrete([2, 3], start=[1, -1]),
    spaces.MultiDiscrete([[2, 3], [4, 5]]),
    spaces.MultiBinary(3),
    spaces.MultiBinary([2, 2]),
    spaces.Tuple([spaces.Discrete(2), spaces.Dict(b=spaces.Box(0, 1, (2,)), a=spaces.MultiBinary(2))]),
]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_space_comes_back_equal_from_plain_data(space: gym.Space) -> None:
    data = space_to_dict(space)
    back = space_from_dict(json.loads(json.dumps(data)))
    assert back == space
    assert (back.shape, back.dtype) == (space.shape, space.dtype)
    if isinstance(space, spaces.Box):
        np.testing.assert_array_equal(back.low, space.low)  # spaces compare bounds only approximately
        np.testing.assert_array_equal(back.high, space.high)


def test_equal_bounds_of_an_image_are_written_once() -> None:
    assert space_to_dict(spaces.Box(0, 255, (84, 84), np.uint8))["high"] == 255


def test_spec_comes_back_equal_from_plain_data() -> None:
    env = gym.make("CartPole-v1")
    spec = EnvSpec("CartPole-v1", env.observation_space, env.action_space)
    assert EnvSpec.from_dict(spec.to_dict()) == spec


def test_spec_is_data_a_weights_only_checkpoint_can_hold(tmp_path) -> None:
    data = EnvSpec("e", SPACES[4], SPACES[1]).to_dict()
    check_plain(data, "spec")
    torch.save(data, tmp_path / "spec.pt")
    assert torch.load(tmp_path / "spec.pt", weights_only=True) == data


@pytest.mark.parametrize(
    "space", [spaces.Text(5), spaces.Dict(a=spaces.Text(5)), spaces.Dict({"a/b": spaces.Discrete(2)})], ids=str
)
def test_unsupported_space_is_named_in_the_error(space: gym.Space) -> None:
    with pytest.raises(SpaceError) as error:
        EnvSpec("e", space, spaces.Discrete(2)).to_dict()
    assert any(name in str(error.value) for name in ("Text(", "'a/b'"))


def test_space_of_a_newer_lit_rl_is_named_in_the_error() -> None:
    with pytest.raises(SpaceError, match=r"'Graph'.*newer"):
        space_from_dict({"type": "Graph"})
