"""Nested values: paths, Tuples as dicts and back, what is stored how."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from tensordict import TensorDict

from lit_rl.errors import SpaceError
from lit_rl.trees import children, find, from_env, iterate, map_tree, nest, row_converter, space_leaves, to_torch

NESTED = spaces.Dict(
    b=spaces.Tuple([spaces.Discrete(3), spaces.Box(-1, 1, (2,), np.float64)]),
    a=spaces.MultiBinary(2),
)


def test_leaves_are_named_by_path_and_a_tuples_elements_by_number() -> None:
    assert list(space_leaves(NESTED, "observation")) == ["observation/b/0", "observation/b/1", "observation/a"]
    assert list(space_leaves(spaces.Discrete(2), "observation")) == ["observation"]


def test_a_tree_is_its_leaves_by_path_and_back() -> None:
    tree = from_env(NESTED, NESTED.sample())
    assert set(tree) == {"a", "b"} and set(tree["b"]) == {"0", "1"}
    columns = dict(iterate(tree))
    assert list(columns) == ["b/0", "b/1", "a"]
    rebuilt = nest(columns)
    assert rebuilt.keys() == tree.keys() and find(rebuilt, "b/1") is tree["b"]["1"]


def test_map_tree_reads_tensordicts_and_dicts_alike() -> None:
    one = {"x": torch.ones(2), "y": {"z": torch.zeros(2)}}
    doubled = map_tree(lambda a, b: a + b, TensorDict(one, [2]), one)
    assert doubled["x"].tolist() == [2, 2] and doubled["y"]["z"].tolist() == [0, 0]


@pytest.mark.parametrize("key", ["", "a/b", "a.b"])
def test_a_key_that_cannot_be_part_of_a_path_is_named(key: str) -> None:
    with pytest.raises(SpaceError, match=f"key {key!r}"):
        children(spaces.Dict({key: spaces.Discrete(2)}))


@pytest.mark.parametrize(
    ("space", "dtype"),
    [
        (spaces.Box(0, 255, (2,), np.uint8), "uint8"),
        (spaces.Box(0, 1, (2,), np.float64), "float32"),
        (spaces.Box(0, 9, (2,), np.int16), "int64"),
        (spaces.MultiBinary(2), "uint8"),
        (spaces.Discrete(2), "int64"),
        (spaces.MultiDiscrete([2, 2]), "int64"),
    ],
    ids=str,
)
def test_what_an_environment_gives_is_stored_small_and_exactly(space: gym.Space, dtype: str) -> None:
    sample: Any = space.sample()
    row = row_converter(space)(sample)
    assert row.dtype == dtype
    np.testing.assert_allclose(row, sample, rtol=1e-6)


def test_a_batch_of_nested_observations_becomes_rows() -> None:
    batched = gym.vector.utils.batch_space(NESTED, 4).sample()
    rows = row_converter(NESTED)(batched)
    assert {path: (leaf.shape, str(leaf.dtype)) for path, leaf in iterate(rows)} == {
        "a": ((4, 2), "uint8"),
        "b/0": ((4,), "int64"),
        "b/1": ((4, 2), "float32"),
    }
    assert to_torch(rows)["b"]["1"].shape == (4, 2)
