"""Action masks: observations that say which actions are legal."""

from collections import OrderedDict

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from lit_rl.distributions import ActionDistribution
from lit_rl.errors import SpaceError
from lit_rl.spec import class_counts
from lit_rl.trees import Tree, find, space_leaves

ACTION_MASK = "action_mask"  # the key of a Dict observation
NEVER = -1e8  # the logit of an illegal action: its probability is exactly 0, and so is its gradient


def split_mask(space: gym.Space) -> tuple[gym.Space, gym.Space | None]:
    """What the encoder sees of an observation space, and the space of its action mask, if it has one.

    Beside the mask there may be any keys; if "observation" is the only one, the encoder is given just that.
    """
    if not isinstance(space, spaces.Dict) or ACTION_MASK not in space.spaces:
        return space, None
    rest = {key: part for key, part in space.spaces.items() if key != ACTION_MASK}
    if not rest:
        raise SpaceError(f"Observation space {space} holds an action_mask alone: add what the policy is to see.")
    kept = rest["observation"] if is_wrapped(space) else spaces.Dict(OrderedDict(rest))
    return kept, space.spaces[ACTION_MASK]


def is_wrapped(space: gym.Space) -> bool:
    """Whether there is nothing but an "observation" beside an action mask: then the encoder is given its inside."""
    return isinstance(space, spaces.Dict) and set(space.spaces) == {"observation", ACTION_MASK}


class ActionMasks:
    """Rules illegal actions out of an action distribution's parameters.

    A mask is a vector with a number for each value of a Discrete action, or for all values of a MultiDiscrete one after
    the other; above 0 means legal. For a Dict or Tuple action it is a Dict or Tuple of such, for the parts that have
    one.

    Args:
        mask_space: of the mask.
        action_space: of the actions.
        distribution: over the actions.

    Raises:
        SpaceError: if a mask does not fit its action.
    """

    def __init__(self, mask_space: gym.Space, action_space: gym.Space, distribution: ActionDistribution):
        # Of each choice: the mask's path, the choice's part of that vector, and its logits' part of the outputs.
        self._choices: list[tuple[str, slice, slice]] = []
        actions = _leaf_choices(action_space, distribution)
        for path, space in space_leaves(mask_space).items():
            choices = actions.get(path, [])
            size = sum(choice.stop - choice.start for choice in choices)
            if not choices or space.shape != (size,) or not isinstance(space, spaces.Box | spaces.MultiBinary):
                wanted = (
                    f"a vector of {size} numbers" if size else "none, since only Discrete and MultiDiscrete have one"
                )
                name = f"action_mask[{path!r}]" if path else "action_mask"
                raise SpaceError(
                    f"The observation's {name} is {space}: expected {wanted}, for the action space {action_space}."
                )
            at = 0
            for choice in choices:
                end = at + choice.stop - choice.start
                self._choices.append((path, slice(at, end), choice))
                at = end

    def blocked(self, mask: Tree) -> np.ndarray:
        """Which rows of masks [B, ...] allow no action, [B]."""
        rows = [~(find(mask, path)[:, mask_at] > 0).any(-1) for path, mask_at, _ in self._choices]
        return np.logical_or.reduce(rows)

    def apply(self, parameters: Tensor, mask: Tree) -> Tensor:
        """Parameters [*B, P] with the logits of illegal actions at NEVER.

        A row without any legal action stays as it is: only rows that are no transitions may be so, and must not make
        NaNs.
        """
        allowed = torch.ones_like(parameters, dtype=torch.bool)
        for path, mask_at, logits_at in self._choices:
            legal = find(mask, path)[..., mask_at] > 0
            allowed[..., logits_at] = legal | ~legal.any(-1, keepdim=True)
        return parameters.masked_fill(~allowed, NEVER)

    def apply_numpy(self, parameters: np.ndarray, mask: Tree) -> None:
        """`apply` for arrays [B, P], in place."""
        for path, mask_at, logits_at in self._choices:
            legal = find(mask, path)[:, mask_at] > 0
            parameters[:, logits_at][~(legal | ~legal.any(-1, keepdims=True))] = NEVER


def _leaf_choices(space: gym.Space, distribution: ActionDistribution) -> dict[str, list[slice]]:
    """The choices of each leaf of an action space, by path, as slices of the whole distribution's outputs."""
    choices, found = list(distribution.choices), {}
    for path, leaf in space_leaves(space).items():
        count = len(class_counts(leaf))
        found[path], choices = choices[:count], choices[count:]
    return found
