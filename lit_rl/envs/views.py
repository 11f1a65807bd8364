"""What central critics see of copies of an environment, kept up to date step by step: see `lit_rl.central`.

Shapes: C copies, S slots of each, N agents.
"""

from collections.abc import Collection
from typing import Any

import gymnasium as gym
import numpy as np

from lit_rl.central import absent, slot_spaces
from lit_rl.envs.multi_agent import MultiAgentEnv
from lit_rl.errors import EnvError, env_error
from lit_rl.masks import is_wrapped, split_mask
from lit_rl.observations import complaint, out_of_range
from lit_rl.spec import MultiAgentSpec, class_counts
from lit_rl.trees import Tree, find, map_tree, nest, row_converter, row_dtype, space_leaves


class Views:
    """The inputs of central critics, of all copies.

    Args:
        spec: the agents.
        kinds: of inputs, see `central_space`.
        num_copies: C.
    """

    def __init__(self, spec: MultiAgentSpec, kinds: Collection[str], num_copies: int):
        self._spec, self._roster, self._num_slots = spec, spec.roster, spec.num_slots
        self._numbers = {name: i for i, name in enumerate(self._roster.names)}
        self._kinds = tuple(kinds)
        self._agent_id = np.zeros((num_copies, self._num_slots, len(self._numbers)), np.uint8)
        self._alive = np.zeros((num_copies, self._num_slots), np.uint8)
        self._state: Tree = None
        self._parts: list[_Part] = []
        if "state" in kinds:
            assert spec.state_space is not None
            self._to_row = row_converter(spec.state_space)
            self._state = _columns(spec.state_space, num_copies)
            self._state_classes = _class_leaves(spec.state_space)
        if "observations" in kinds:
            self._parts = [_Part(space, num_copies) for space in slot_spaces(spec)]

    def begin(self, copy: int) -> None:
        """An episode begins: nobody is there yet."""
        for slot in range(self._num_slots):
            self.leave(copy, slot)

    def see(self, copy: int, slot: int, agent: str, obs: Any) -> None:
        """What an agent in a slot of a copy observes now.

        Raises:
            EnvError: if it is not in the space.
        """
        self._agent_id[copy, slot] = 0
        self._agent_id[copy, slot, self._numbers[str(self._roster.name_of(agent))]] = 1
        self._alive[copy, slot] = 1
        if self._parts:
            part = self._parts[slot]
            try:
                part.write(copy, obs)
            except (TypeError, ValueError, LookupError) as error:
                problem = complaint(part.space, obs, "observation")
                raise EnvError(
                    f"env={self._spec.env_id}: agent {agent!r} was given what is not in its observation_space: "
                    f"{problem or error}. Mend the environment."
                ) from None

    def leave(self, copy: int, slot: int) -> None:
        """An agent is no longer there."""
        self._alive[copy, slot] = 0
        if self._parts:
            self._parts[slot].clear(copy)

    def see_state(self, copy: int, env: MultiAgentEnv) -> None:
        """Take the state of a copy, if it is asked for.

        Raises:
            EnvError: if it has none, or gives one that is not in its space.
        """
        if self._state is None:
            return
        space: Any = self._spec.state_space
        try:
            state = env.state()  # type: ignore[attr-defined]
        except Exception as error:
            raise env_error(self._spec.env_id, "raised in state", error) from error
        problem = complaint(space, state, "state")
        if problem:
            raise EnvError(f"env={self._spec.env_id}: state() is not in state_space: {problem}. Mend the environment.")
        row = self._to_row(state)
        wrong = _unknown_class(self._state_classes, row)
        if wrong is not None:
            raise EnvError(f"env={self._spec.env_id}: state() gave {wrong}. Mend the environment.")
        map_tree(lambda column, x: _put(column, copy, x), self._state, row)

    def rows(self, kind: str, slots: np.ndarray) -> Tree:
        """The inputs of agents in slots [N] of all copies, [N, ...]."""
        copies, places = np.divmod(slots, self._num_slots)
        agent_id = self._agent_id[copies, places]
        if kind == "state":
            return {"state": map_tree(lambda x: x[copies], self._state), "agent_id": agent_id}
        seen = {str(i): map_tree(lambda x: x[copies], part.columns) for i, part in enumerate(self._parts)}
        return {"observations": seen, "alive": self._alive[copies], "agent_id": agent_id}

    def row(self, slot: int) -> dict[str, Tree]:
        """The inputs of the agent in a slot, [...], by kind."""
        return {kind: map_tree(lambda x: x[0], self.rows(kind, np.array([slot]))) for kind in self._kinds}


class _Part:
    """What the agents in one slot of each copy observe, [C, *obs], without action masks."""

    def __init__(self, space: gym.Space, num_copies: int):
        self.space = space
        seen, _ = split_mask(space)
        self._unwraps = is_wrapped(space)
        self._classes = _class_leaves(seen)
        self._to_row = row_converter(seen)
        self.columns = _columns(seen, num_copies)
        nothing = {path: absent(leaf) for path, leaf in space_leaves(seen, "obs").items()}
        self._nothing = nest(nothing)["obs"]

    def write(self, copy: int, obs: Any) -> None:
        row = self._to_row(obs["observation"] if self._unwraps else obs)
        wrong = _unknown_class(self._classes, row)
        if wrong is not None:
            raise ValueError(wrong)
        map_tree(lambda column, x: _put(column, copy, x), self.columns, row)

    def clear(self, copy: int) -> None:
        map_tree(lambda column, x: _put(column, copy, x), self.columns, self._nothing)


def _class_leaves(space: gym.Space) -> dict[str, gym.Space]:
    """The leaves that are whole numbers of some classes, by path."""
    return {path: leaf for path, leaf in space_leaves(space).items() if class_counts(leaf)}


def _unknown_class(leaves: dict[str, gym.Space], row: Tree) -> str | None:
    """What a row [...] holds that is none of the classes there are, in words; None if there is nothing."""
    for path, leaf in leaves.items():
        value = find(row, path)
        if out_of_range(leaf, value).any():
            return f"{value}, expected a value in {leaf}"
    return None


def _columns(space: gym.Space, num_copies: int) -> Tree:
    """Zeros [C, ...] for each leaf of a space."""
    found = {
        path: np.zeros((num_copies, *(leaf.shape or ())), row_dtype(leaf))
        for path, leaf in space_leaves(space, "obs").items()
    }
    return nest(found)["obs"]


def _put(column: np.ndarray, copy: int, row: Any) -> None:
    if np.shape(row) != column.shape[1:]:  # numpy would repeat a smaller one
        raise ValueError("another shape")
    column[copy] = row
