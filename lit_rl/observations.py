"""Observations as people pass them: one or a batch, numpy or torch, nested or not."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_rl.errors import OptionError
from lit_rl.networks.inputs import class_counts
from lit_rl.spec import EnvSpec
from lit_rl.trees import Tree, find, is_leaf, map_tree, row_converter, space_leaves


def rows_of(spec: EnvSpec, obs: Any) -> tuple[Tree, bool]:
    """A user's observation as rows [B, *obs], and whether it was a single one.

    Raises:
        OptionError: if it is not an observation of the space, or several.
    """
    space = spec.observation_space
    try:
        given = row_converter(space)(_detached(obs))
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise OptionError(f"obs={obs!r}: expected an observation in {space}, as {spec.env_id} gives it.") from error
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
        if class_counts(part):
            low = np.asarray(part.start)  # type: ignore[attr-defined]
            if not ((array >= low) & (array < low + np.reshape(class_counts(part), shape))).all():
                raise OptionError(f"{name}={array!r}: expected whole numbers in {part}, as {spec.env_id} gives them.")
    if len(batches) > 1:
        raise OptionError(f"obs={obs!r}: its parts hold different numbers of observations.")
    single = batches == {None}
    return (map_tree(lambda x: x[None], given) if single else given), single


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
