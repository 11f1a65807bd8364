"""Time lines of agents that act when they are asked: as many rows as an agent acted, whatever went on meanwhile.

Row t of slot s is at place t * S + s of each column, so that one number finds it: that is several times as fast as two.

Shapes: S slots, B time lines, T rows of the longest of them, N of the time lines, of which something is said.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from lit_rl.runners.fragment import FragmentLayout, put
from lit_rl.runners.transport import Packed
from lit_rl.spec import EnvSpec
from lit_rl.trees import Tree, iterate, map_tree, nest

ROOM = 16  # rows of each time line at first


class TimeLines:
    """Rows of B time lines, which differ in length. A row is complete when its agent is asked again, or has ended.

    A row that is not complete at the end of a fragment is not in it: the next one begins with it, as it was.

    Args:
        spec: of all of them.
        num_slots: of all agents.
        state: what the policy carries at an episode's start, of all slots; None without memory.
        keep_states: keep the state before every row, instead of the first alone.
        slots: those of which there are time lines, [B]; None: all of them.
        central: the space of a central critic's inputs; None without.
    """

    def __init__(
        self,
        spec: EnvSpec,
        num_slots: int,
        *,
        state: Tree,
        keep_states: bool,
        slots: np.ndarray | None = None,
        central: gym.Space | None = None,
    ):
        self._spec, self._keep_states, self._central = spec, keep_states, central
        self._lay_out(np.arange(num_slots) if slots is None else slots, state)
        self._fields = self._layout.row_fields
        self._seen_paths = [path for path in self._fields if path.split("/")[0] in ("observation", "central")]
        self._num_slots = num_slots
        self._at = np.arange(num_slots)  # places of the rows after the complete ones
        self._goes_on = np.zeros(num_slots, np.bool_)  # whether there is a row after them, with an observation at least
        self._pending = [0.0] * num_slots  # rewards of the row that is not complete
        self._columns: dict[str, np.ndarray] = {}  # [T * S, ...]
        self._make_room(ROOM)
        # The state before each time line's first row, and before its newest.
        self._first_state, self._state = (None if state is None else map_tree(np.array, state) for _ in range(2))
        self._finals: list[tuple[int, int, Tree]] = []

    def move(self, slots: np.ndarray) -> None:
        """Have the time lines of other slots, between two fragments. Those of which something is under way go on."""
        self._lay_out(slots, self._state)

    @property
    def num_complete(self) -> int:
        """Complete rows of all time lines."""
        return int(self._counts().sum())

    def ask(self, slots: np.ndarray, obs: Tree, is_init: np.ndarray, central: Tree = None) -> None:
        """Agents are to act: a row of each begins.

        Args:
            slots: their time lines, [N].
            obs: what they see, [N, *obs].
            is_init: whether they begin an episode, [N].
            central: what a central critic sees, [N, ...]; None without.
        """
        at, room = self._at[slots], len(self._columns["is_init"])
        if max(at.tolist()) >= room:
            self._make_room(2 * room // self._num_slots)
        for path, values in iterate(obs, "observation"):
            self._columns[path][at] = values
        if central is not None:
            for path, values in iterate(central, "central"):
                self._columns[path][at] = values
        self._columns["is_init"][at] = is_init
        self._goes_on[slots] = True

    def act(self, slots: np.ndarray, action: Tree, log_prob: np.ndarray, state: Tree, version: int) -> None:
        """What the agents do that were asked, and the state [N, ...] before."""
        at = self._at[slots]
        for path, values in iterate(action, "action"):
            self._columns[path][at] = values
        self._columns["action_log_prob"][at] = log_prob
        self._columns["policy_version"][at] = version
        if state is None:
            return
        first = at == slots
        map_tree(lambda rows, x: put(rows, slots, x), self._state, state)
        map_tree(lambda rows, x: put(rows, slots[first], x[first]), self._first_state, state)
        if self._keep_states:
            for path, values in iterate(state, "state"):
                self._columns[path][at] = values

    def credit(self, slot: int, reward: float) -> None:
        """A reward for what a time line's agent did last."""
        self._pending[slot] += reward

    def complete(self, slots: Sequence[int]) -> None:
        """What these agents did last is complete, and they go on."""
        places, pending = np.array(slots), self._pending
        at = self._at[places]
        self._columns["reward"][at] = [pending[slot] for slot in slots]
        self._at[places] = at + self._num_slots
        for slot in slots:
            pending[slot] = 0.0

    def end(self, slot: int, terminated: bool, truncated: bool, obs: Tree | None, central: Tree = None) -> None:
        """An agent has left.

        Without a final observation or central inputs, which nothing then looks at, its last ones stand for them.
        """
        at = int(self._at[slot])
        final = self._seen(at)
        final["observation"] = final["observation"] if obs is None else obs
        final |= {} if central is None else {"central": central}
        self._finals.append((slot, at // self._num_slots, final))
        self._columns["terminated"][at], self._columns["truncated"][at] = terminated, truncated
        self.complete([slot])
        self._goes_on[slot] = False

    def drop(self, slot: int) -> None:
        """An agent's environment failed: its episode is truncated before what it did last."""
        at = int(self._at[slot])
        last = at - self._num_slots
        if last >= 0 and not (self._columns["terminated"][last] or self._columns["truncated"][last]):
            self._columns["truncated"][last] = True
            self._finals.append((slot, last // self._num_slots, self._seen(at)))
        self._pending[slot] = 0.0
        self._goes_on[slot] = False

    def fragment(self, version: int) -> tuple[Packed, Packed]:
        """Rows and finals of all that is complete, see `Fragment`; what is not begins the next one.

        Args:
            version: of the policy now.
        """
        size, at, slots = self._num_slots, self._at, self.slots
        count = self._counts()
        num_rows = max(1, int(count.max()))
        rows = self._layout.allocate(num_rows)
        view = rows.views()
        for path, column in self._columns.items():
            rows_of = column.reshape(len(column) // size, size, *column.shape[1:])[:num_rows, slots]
            view[path][...] = rows_of.swapaxes(0, 1)
        view["mask"][...] = np.arange(num_rows) < count[slots, None]
        view["policy_version"][~view["mask"]] = version  # padding is of no other age than the rest
        view["length"][...] = count[slots]
        last = np.where(self._goes_on | (count == 0), at, at - size)[slots]
        for path in self._seen_paths:
            view[f"last_{path}"][...] = self._columns[path][last]
        if self._first_state is not None and not self._keep_states:
            map_tree(lambda rows, x: np.copyto(rows, x[slots]), nest(view)["state"], self._first_state)
        finals = self._layout.pack_finals([(self._place[slot], t, obs) for slot, t, obs in self._finals], [], num_rows)
        self._finals = []
        open_ = np.flatnonzero(self._goes_on)
        for column in self._columns.values():
            column[open_] = column[at[open_]]
        self._columns["terminated"][...] = self._columns["truncated"][...] = False  # until an agent ends
        if self._first_state is not None:
            map_tree(lambda rows, x: put(rows, open_, x[open_]), self._first_state, self._state)
        self._at = np.arange(size)
        return rows, finals

    def state(self) -> dict[str, Any]:
        """What begins the next fragment, between two of them, as tensors."""
        arrays = {f"column/{path}": column[: self._num_slots] for path, column in self._columns.items()}
        arrays |= {"pending": np.array(self._pending), "goes_on": self._goes_on}
        if self._state is not None:
            arrays |= dict(iterate(self._first_state, "first")) | dict(iterate(self._state, "newest"))
        return {path: torch.from_numpy(np.array(array)) for path, array in arrays.items()}

    def load(self, state: Mapping[str, torch.Tensor], slots: np.ndarray) -> None:
        """Have some slots go on from what `state` returned."""
        arrays = {path: tensor.numpy()[slots] for path, tensor in state.items()}
        for path, column in self._columns.items():
            column[slots] = arrays[f"column/{path}"]
        self._goes_on[slots] = arrays["goes_on"]
        for slot, reward in zip(slots.tolist(), arrays["pending"].tolist()):
            self._pending[slot] = reward
        if self._state is not None:
            for name, tree in (("first", self._first_state), ("newest", self._state)):
                for path, rows in iterate(tree, name):
                    rows[slots] = arrays[path]

    def clear(self, slots: np.ndarray) -> None:
        """Forget what is under way in some slots."""
        self._goes_on[slots] = False
        for slot in slots.tolist():
            self._pending[slot] = 0.0

    def _lay_out(self, slots: np.ndarray, state: Tree) -> None:
        self.slots = slots
        kept = None if state is None else map_tree(lambda x: x[slots], state)
        self._layout = FragmentLayout(
            self._spec,
            len(slots),
            state=kept,
            keep_states=self._keep_states,
            has_mask=True,
            ragged=True,
            central=self._central,
        )
        self._place = {slot: b for b, slot in enumerate(slots.tolist())}

    def _make_room(self, num_rows: int) -> None:
        """Have room for so many rows of each time line."""
        old = self._columns
        self._columns = {
            path: np.zeros((num_rows * self._num_slots, *shape), dtype)
            for path, (dtype, shape) in self._fields.items()
            if path != "mask"
        }
        for path, column in old.items():
            self._columns[path][: len(column)] = column

    def _counts(self) -> np.ndarray:
        """Complete rows of each slot, [S]."""
        return self._at // self._num_slots

    def _seen(self, at: int) -> dict[str, Tree]:
        """A copy of the observation at a place, and of the central inputs if there are any."""
        return nest({path: self._columns[path][at].copy() for path in self._seen_paths})
