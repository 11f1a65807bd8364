"""Nested observations, actions and states: a tree is an array, or a dict of trees.

Dict spaces keep their keys; the elements of a Tuple space become the keys "0", "1", ... Such dicts are what networks
and distributions are given, in numpy or torch, and what a rollout holds as nested TensorDicts. Between processes a
leaf is named by its path, "arm/position".
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces

from lit_rl.errors import SpaceError

Tree: TypeAlias = Any


def is_leaf(tree: Tree) -> bool:
    return not hasattr(tree, "keys")  # a dict and a TensorDict have keys; the latter is not imported here


def map_tree(function: Callable[..., Any], *trees: Tree) -> Tree:
    """A tree of `function(leaf, ...)` for the leaves of trees of equal structure."""
    first = trees[0]
    if is_leaf(first):
        return function(*trees)
    return {key: map_tree(function, *(tree[key] for tree in trees)) for key in first.keys()}  # noqa: SIM118


def leaves(tree: Tree) -> list[Any]:
    """The leaves alone."""
    return [leaf for _, leaf in iterate(tree)]


def iterate(tree: Tree, name: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) pairs; `name` begins every path."""
    if is_leaf(tree):
        yield name, tree
        return
    for key in tree.keys():  # noqa: SIM118
        yield from iterate(tree[key], f"{name}/{key}" if name else key)


def nest(columns: Mapping[str, Any]) -> dict[str, Any]:
    """A tree from its leaves by path: {"a/b": x} becomes {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for path, leaf in columns.items():
        *parents, key = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[key] = leaf
    return tree


def find(tree: Tree, path: str) -> Any:
    """The leaf or branch at a path; "" is the tree itself."""
    for key in path.split("/") if path else ():
        tree = tree[key]
    return tree


def children(space: gym.Space) -> dict[str, gym.Space] | None:
    """The parts of a Dict or Tuple space by key; None for any other.

    Raises:
        SpaceError: for an empty space, or a key that could not be told from a path.
    """
    if not isinstance(space, spaces.Tuple | spaces.Dict):
        return None
    if not space.spaces:
        raise SpaceError(f"The space {space} is not supported: it is empty. Leave it out.")
    if isinstance(space, spaces.Tuple):
        return {str(i): part for i, part in enumerate(space.spaces)}
    for key in space.spaces:
        if not isinstance(key, str) or not key or "/" in key or "." in key:
            raise SpaceError(f"{space} has the key {key!r}: expected a non-empty string without '/' and '.'.")
    return dict(space.spaces)


def space_leaves(space: gym.Space, name: str = "") -> dict[str, gym.Space]:
    """The spaces of the leaves by path, in the space's order; a space that is not nested has the path `name`."""
    parts = children(space)
    if parts is None:
        return {name: space}
    found: dict[str, gym.Space] = {}
    for key, part in parts.items():
        found |= space_leaves(part, f"{name}/{key}" if name else key)
    return found


def from_env(space: gym.Space, value: Any) -> Tree:
    """What an environment gives for `space` (of one environment or of several), as a tree."""
    parts = children(space)
    if parts is None:
        return value
    if isinstance(space, spaces.Tuple):
        return {key: from_env(part, value[int(key)]) for key, part in parts.items()}
    return {key: from_env(part, value[key]) for key, part in parts.items()}


def row_dtype(space: gym.Space) -> str:
    """The dtype that stores a leaf: bytes and flags as bytes, other whole numbers as int64, the rest as float32."""
    dtype = np.dtype(space.dtype)
    if isinstance(space, spaces.MultiBinary) or dtype in (np.uint8, np.bool_):
        return "|u1"
    return "<i8" if dtype.kind in "iu" else "<f4"


def to_torch(tree: Tree, device: Any = None) -> Tree:
    """Arrays as tensors, sharing memory where they can."""
    return map_tree(lambda x: torch.as_tensor(x, device=device), tree)


def to_numpy(tree: Tree) -> Tree:
    """Tensors as arrays; arrays stay."""
    return map_tree(lambda x: x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else x, tree)


def row_converter(space: gym.Space) -> Callable[[Any], Tree]:
    """A function from what an environment gives (of one environment or of several) to a tree of arrays as stored."""
    parts = children(space)
    if parts is None:
        return functools.partial(np.asarray, dtype=np.dtype(row_dtype(space)))
    as_tuple = isinstance(space, spaces.Tuple)
    converters = {key: (int(key) if as_tuple else key, row_converter(part)) for key, part in parts.items()}
    return functools.partial(_convert_parts, converters)


def _convert_parts(converters: dict[str, tuple[str | int, Callable[[Any], Tree]]], value: Any) -> Tree:
    return {key: convert(value[at]) for key, (at, convert) in converters.items()}
