"""Observations as people and environments pass them: one or a batch, numpy or torch, nested or not."""

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from lit_rl.errors import OptionError
from lit_rl.spec import EnvSpec, class_counts
from lit_rl.trees import Tree, find, is_leaf, map_tree, row_converter, row_dtype, space_leaves


def rows_of(spec: EnvSpec, obs: Any) -> tuple[Tree, bool]:
    """A user's observation as rows [B, *obs], and whether it was a single one.

    Raises:
        OptionError: if it is not an observation of the space, or several.
    """
    space = spec.observation_space
    raw = _detached(obs)
    problem = complaint(space, raw, "obs", shapes=False)
    if problem:
        raise OptionError(f"{problem}, as {spec.env_id} gives it.")
    given = row_converter(space)(raw)
    batches = set()
    for path, part in space_leaves(space).items():
        array, shape = find(given, path), part.shape or ()
        name = f"obs[{path!r}]" if path else "obs"
        extra = array.ndim - len(shape)
        if extra not in (0, 1) or array.shape[extra:] != shape:
            batch = ", ".join(map(str, ("B", *shape)))
            raise OptionError(
                f"{name} has shape {array.shape}: expected {shape}, or ({batch}) for a batch, as {spec.env_id} gives "
                "it."
            )
        batches.add(len(array) if extra else None)
        if out_of_range(part, array).any():
            raise OptionError(
                f"{name}={short(array.tolist())}: expected whole numbers in {part}, as {spec.env_id} gives them."
            )
    if len(batches) > 1:
        raise OptionError(f"obs: its parts hold different numbers of observations, {sorted(batches, key=str)}.")
    if batches == {0}:
        raise OptionError("obs holds no observation: expected one, or a batch of at least one.")
    single = batches == {None}
    return (map_tree(lambda x: x[None], given) if single else given), single


def complaint(space: gym.Space, value: Any, name: str, *, shapes: bool = True) -> str | None:
    """What is wrong with an environment's observation, as the beginning of a sentence; None if nothing is.

    Args:
        space: it should be in.
        value: the observation; with `shapes=False` also a batch of them.
        name: how the sentence calls it.
        shapes: whether leaves must have their space's shape.
    """
    if isinstance(space, spaces.Dict):
        if not hasattr(value, "keys"):
            return f"{name} is a {type(value).__name__}: expected a dict with the keys {list(space.spaces)}"
        missing = [key for key in space.spaces if key not in value.keys()]  # noqa: SIM118
        if missing:
            return f"{name} has no {missing[0]!r}: expected a dict with the keys {list(space.spaces)}"
        parts: list[tuple[str | int, gym.Space, Any]] = [(key, part, value[key]) for key, part in space.spaces.items()]
    elif isinstance(space, spaces.Tuple):
        if not isinstance(value, tuple | list) or len(value) != len(space.spaces):
            found = f"{len(value)} parts" if isinstance(value, tuple | list) else f"a {type(value).__name__}"
            return f"{name} is {found}: expected a tuple of {len(space.spaces)} parts"
        parts = list(zip(range(len(value)), space.spaces, value))
    else:
        return _leaf_complaint(space, value, name, shapes)
    return next(filter(None, (complaint(part, x, f"{name}[{key!r}]", shapes=shapes) for key, part, x in parts)), None)


def _leaf_complaint(space: gym.Space, value: Any, name: str, shapes: bool) -> str | None:
    if not isinstance(space, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        return None  # refused elsewhere, by its name
    try:
        array = np.asarray(value)
    except ValueError:  # lists of different lengths
        return f"{name}={short(value)}: expected an array in {space}"
    if array.dtype.kind not in "biuf":
        return f"{name}={short(array.tolist())}: expected numbers in {space}"
    if shapes and array.shape != (space.shape or ()):
        return f"{name} has shape {array.shape}: expected {space.shape or ()}, in {space}"
    stored = np.dtype(row_dtype(space))
    if stored.kind == "f":
        return None if np.isfinite(array).all() else f"{name}={short(array.tolist())}: expected finite numbers"
    # Floats for bytes are pictures scaled to 0..1, even where they happen to be whole.
    if (array.dtype.kind == "f" and space.dtype == np.uint8) or not (array == array.astype(stored)).all():
        limits = "from 0 to 255 " if stored == np.uint8 else ""
        return f"{name}={short(array.tolist())}: expected whole numbers {limits}in {short(space)}"
    return None


def stacked(space: gym.Space, observations: list[Any], *, convert: bool = False) -> Any:
    """Observations of several environments as one batch, in the space's structure and data types.

    Args:
        space: that they are in.
        observations: one of each environment.
        convert: also those in which there is no `complaint`, but which are not of the usual types.

    Raises:
        ValueError, TypeError, LookupError: if one has another shape or structure, or would be cut to the data type.
    """
    if isinstance(space, spaces.Dict):
        items = space.spaces.items()
        return {key: stacked(part, [obs[key] for obs in observations], convert=convert) for key, part in items}
    if isinstance(space, spaces.Tuple):
        if {len(obs) for obs in observations} != {len(space.spaces)}:
            raise ValueError("a tuple of another length")
        parts = enumerate(space.spaces)
        return tuple(stacked(part, [obs[i] for obs in observations], convert=convert) for i, part in parts)
    batch = np.array(observations)
    if batch.shape[1:] != space.shape:
        raise ValueError("another shape")
    if batch.dtype == space.dtype:
        return batch
    given, wanted = batch.dtype.kind, np.dtype(space.dtype).kind
    converted = batch.astype(space.dtype)
    if convert or (wanted == "f" and given in "biuf"):
        return converted
    # Floats for whole numbers are looked at closely: for bytes they may be pictures scaled to 0..1.
    if given not in "biu" or not (converted == batch).all():
        raise ValueError("another data type")
    return converted


def out_of_range(space: gym.Space, array: np.ndarray) -> np.ndarray:
    """Where an array [*B, *shape] holds classes that its Discrete or MultiDiscrete space does not have."""
    if not class_counts(space):
        return np.zeros((), np.bool_)
    low = np.asarray(space.start)  # type: ignore[attr-defined]
    return (array < low) | (array >= low + np.reshape(class_counts(space), space.shape or ()))


def short(value: Any) -> str:
    """A value in at most 80 characters of one line."""
    text = " ".join(repr(value).split())
    return text if len(text) < 80 else f"{text[:77]}..."


def holds_tensors(obs: Any) -> bool:
    """Whether any part of a user's observation is a tensor."""
    if isinstance(obs, tuple):
        return any(holds_tensors(part) for part in obs)
    return isinstance(obs, Tensor) if is_leaf(obs) else any(holds_tensors(part) for part in obs.values())


def as_tensors(action: Any) -> Any:
    """An action for the environment in tensors, tuples and dicts kept."""
    if isinstance(action, tuple):
        return tuple(as_tensors(part) for part in action)
    if isinstance(action, dict):
        return {key: as_tensors(part) for key, part in action.items()}
    return torch.as_tensor(action)


def _detached(obs: Any) -> Any:
    if isinstance(obs, Tensor):
        return obs.detach().cpu().numpy()
    if isinstance(obs, tuple):
        return tuple(_detached(part) for part in obs)
    return obs if is_leaf(obs) else {key: _detached(part) for key, part in obs.items()}
