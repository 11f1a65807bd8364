"""Experience replay: transitions of many environments in one ring of rows.

A row is an observation and, once it is known, what was done there and what came of it: action, reward, whether the
episode ended, and the number of the row with the next observation. So every observation is stored once. An episode's
final observation takes a row of its own, and so does the newest observation of each environment, whose action is not
known yet; neither is a transition, and neither is drawn.

Rows are written in the order of time: what a row's links lead to is newer than itself, and is overwritten later.

Shapes: B envs, T steps of a fragment; M rows of a minibatch, or S sequences, L steps of each, K steps before them.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from lit_rl.errors import ReplayError
from lit_rl.files.snapshots import DiskColumns, Snapshots
from lit_rl.replay.sum_tree import SumTree
from lit_rl.returns import n_step, n_step_in_sequences
from lit_rl.spec import EnvSpec
from lit_rl.trees import nest, row_dtype, space_leaves

TRANSITION, TERMINATED, DONE, IS_INIT = np.array([1, 2, 4, 8], np.uint8)  # bits of a row's flags
NOT_YET = -1
SMALLEST_PRIORITY = 1e-6  # added to every TD error, so that no transition is out of reach


class ReplayBuffer:
    """A ring of `capacity` rows, filled by several environments and drawn from at random.

    Args:
        spec: of the environments.
        capacity: rows; an episode's final observation takes one too.
        state: arrays [1, ...] by path ("state/h"), for a policy with memory: its state before each row is kept.
        priority_alpha: prioritised replay (Schaul et al. 2016, arXiv:1511.05952) draws in proportion to the priorities
            to this power; None draws uniformly.
        storage_dir: where observations, actions and states lie in memory-mapped files; None keeps them in memory.
        seed: of what is drawn.
    """

    def __init__(
        self,
        spec: EnvSpec,
        capacity: int,
        *,
        state: Mapping[str, np.ndarray] | None = None,
        priority_alpha: float | None = None,
        storage_dir: str | Path | None = None,
        seed: np.random.SeedSequence | None = None,
    ):
        fields = {
            path: (row_dtype(space), space.shape or ())
            for name, part in (("observation", spec.observation_space), ("action", spec.action_space))
            for path, space in space_leaves(part, name).items()
        }
        fields |= {path: (array.dtype.str, array.shape[1:]) for path, array in (state or {}).items()}
        self.capacity = capacity
        self.rng = np.random.default_rng(seed)
        self._disk = None if storage_dir is None else DiskColumns(storage_dir, capacity, fields)
        columns = self._disk.columns if self._disk else {}
        self._columns = {
            path: columns[path] if self._disk else np.zeros((capacity, *shape), dtype)
            for path, (dtype, shape) in fields.items()
        }
        self._obs_paths = [path for path in fields if path.startswith("observation")]
        self._other_paths = [path for path in fields if not path.startswith("observation")]
        self._tensors = {path: torch.from_numpy(column) for path, column in self._columns.items()}
        self._reward = np.zeros(capacity, np.float32)
        self._flags = np.zeros(capacity, np.uint8)
        link = np.int32 if capacity < 2**31 else np.int64
        self._next = np.zeros(capacity, link)
        self._previous = np.full(capacity, NOT_YET, link) if state is not None else None
        self._tree = None if priority_alpha is None else SumTree(capacity)
        self._alpha = priority_alpha or 0.0
        self._max_priority = 1.0
        self._written = 0  # rows since the beginning; row number n lies at n % capacity
        self._num_transitions = 0
        # Of each environment: its newest observation's row number, and whether an episode begins there.
        self._open: dict[int, tuple[int, bool]] = {}
        self._snapshots = Snapshots(capacity)

    def __len__(self) -> int:
        """Transitions that can be drawn."""
        return self._num_transitions

    @property
    def can_draw(self) -> bool:
        """Whether there is anything to draw."""
        return self._num_transitions > 0

    # --- writing ------------------------------------------------------------------------------------------------

    def extend(self, rows: Mapping[str, np.ndarray], envs: Iterable[int], rollout_length: int | None = None) -> int:
        """Append a fragment [B, T] of an env runner; returns how many transitions that were.

        Where its time lines have a `length` [B], an environment goes on after step `length - 1`; one of length 0 is
        left as it is.

        Args:
            rows: the fragment's arrays by path: see `runners.fragment.Fragment`; with `state` [B, T, ...] if states
                are kept.
            envs: a number for each of the B environments, the same in each call. One that does not go on where it
                was (because its runner was replaced) begins a new chain of rows.
            rollout_length: of which T is a multiple. The rows lie as if every so many steps had been appended by
                themselves. None: T.

        Raises:
            ReplayError: if a file of `storage_dir` cannot grow.
        """
        if "length" in rows:
            parts = _of_equal_length(rows, np.asarray(list(envs)))
            return sum(self.extend(part, numbers) for part, numbers in parts)
        batch, length = rows["reward"].shape
        rollout_length = rollout_length or length
        mask = rows.get("mask")
        done = rows["terminated"] | rows["truncated"]
        final_b, final_f = (rows["final_step"] >= 0).nonzero()
        final_t = rows["final_step"][final_b, final_f]
        if rollout_length < length and len(final_t) > 1:  # those of the first `rollout_length` steps come first
            order = (final_t // rollout_length).argsort(kind="stable")
            final_b, final_f, final_t = final_b[order], final_f[order], final_t[order]
        numbers, new_heads, finals = self._allocate(rows, list(envs), final_t, rollout_length)
        position, finals = numbers % self.capacity, finals % self.capacity
        now, links = position[:, :length], position[:, 1:]

        for path in self._obs_paths:
            column, values = self._columns[path], rows[path]
            if np.count_nonzero(new_heads):
                column[position[new_heads, 0]] = values[new_heads, 0]
            if length > 1:
                column[position[:, 1:length]] = values[:, 1:]
            column[position[:, length]] = rows[f"last_{path}"]
            if len(finals):
                column[finals] = rows[f"final_{path}"][final_b, final_f]
        for path in self._other_paths:
            self._columns[path][now] = rows[path]
        self._reward[now] = rows["reward"]
        if len(finals):
            links = links.copy()
            links[final_b, final_t] = finals
        self._next[now] = links
        if self._previous is not None:
            self._previous[links] = now
        if len(finals):  # what follows a final observation is the next episode
            self._next[finals] = position[final_b, final_t + 1]
            if self._previous is not None:
                self._previous[position[final_b, final_t + 1]] = finals
        flags = rows["terminated"] * TERMINATED
        flags |= done * DONE
        flags |= rows["is_init"] * IS_INIT
        flags |= TRANSITION
        if mask is not None:
            flags *= mask
        self._flags[now] = flags

        count = batch * length if mask is None else int(mask.sum())
        self._num_transitions += count
        if self._tree is not None:
            # A new transition is drawn soon: it has the greatest priority of all.
            self._tree.set((now if mask is None else now[mask]).reshape(-1), self._max_priority**self._alpha)
        begins = done[:, -1] if mask is None else ~mask[:, -1]
        if len(finals):
            begins[final_b[final_t == length - 1]] = True
        self._open.update(zip(envs, zip(numbers[:, -1].tolist(), begins.tolist())))
        self._snapshots.touch(position, finals)
        return count

    def _allocate(
        self, rows: Mapping[str, np.ndarray], envs: list[int], final_t: np.ndarray, rollout_length: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row numbers [B, T + 1] of a fragment's observations, which environments' first are new, numbers of finals.

        Of every `rollout_length` steps come all environments' observations, then the finals.
        """
        (batch, length), num_finals = rows["reward"].shape, len(final_t)
        most = batch * (length + 1) + num_finals
        if most > self.capacity:
            raise ReplayError(
                f"buffer_size={self.capacity}: one fragment of {batch} environments takes {most} rows. Raise it, or "
                "shorten rollout_length."
            )
        numbers = np.empty((batch, length + 1), np.int64)
        heads, begin = zip(*[self._open.get(env, (NOT_YET, False)) for env in envs])
        numbers[:, 0] = heads
        oldest = self._written + most - self.capacity  # what is older will have been overwritten
        goes_on = (numbers[:, 0] >= max(oldest, 0)) & (rows["is_init"][:, 0] == begin)
        for path in self._obs_paths:  # and the row has the observation with which the fragment begins
            same = self._columns[path][numbers[:, 0] % self.capacity] == rows[path][:, 0]
            goes_on &= same.reshape(batch, -1).all(1)
        new_heads = ~goes_on
        num_heads = batch - int(np.count_nonzero(goes_on))
        start, first = self._written, self._written + num_heads
        if num_heads:
            numbers[new_heads, 0] = np.arange(start, first)
        numbers[:, 1:] = np.arange(first, first + batch * length).reshape(length, batch).T
        finals = np.arange(first, first + num_finals)
        if num_finals:
            parts = final_t // rollout_length  # in rising order
            numbers[:, 1:] += parts.searchsorted(np.arange(length) // rollout_length)
            finals += (parts + 1) * (batch * rollout_length)
        end = first + batch * length + num_finals
        if self._disk is not None:
            self._disk.reserve(min(end, self.capacity))
        if end > self.capacity:  # there were others
            taken = np.arange(start, end) % self.capacity
            self._num_transitions -= int(np.count_nonzero(self._flags[taken] & TRANSITION))
            self._flags[taken] = 0
            if self._previous is not None:
                self._previous[taken] = NOT_YET
            if self._tree is not None:
                self._tree.set(taken, 0.0)
        self._written = end
        return numbers, new_heads, finals

    # --- drawing ------------------------------------------------------------------------------------------------

    def sample(
        self, num: int, *, gamma: float = 1.0, num_steps: tuple[int, int] = (1, 1), beta: float = 0.0
    ) -> TensorDict:
        """Transitions [M], drawn with replacement.

        Keys: `observation, action, index` (for `update_priorities`), `discount` (gamma to the number of steps summed),
        `weight` if prioritised, and under "next": `observation` (after the last step summed), `reward` (their
        discounted sum) and `terminated` (in the last of them).

        Args:
            num: M.
            gamma: discount per env step.
            num_steps: the least and the most rewards to sum, drawn anew for each transition. Fewer are summed where
                the episode ends, or where it has not gone on yet.
            beta: how far `weight` makes up for the priorities.
        """
        index, weight = self._draw(num, beta)
        return self.transitions(index, weight, gamma=gamma, num_steps=num_steps)

    def transitions(
        self,
        index: np.ndarray,
        weight: np.ndarray | None = None,
        *,
        gamma: float = 1.0,
        num_steps: tuple[int, int] = (1, 1),
    ) -> TensorDict:
        """The transitions at rows [M], as `sample` gives them."""
        num, last, (low, high) = len(index), index, num_steps
        reward: Any = self._reward[index]
        discount: Any = np.full(num, gamma, np.float32)
        if high > 1:
            wanted = self.rng.integers(low, high + 1, num) if high > low else np.full(num, high)
            last, rewards, steps = self._follow(index, wanted, high)
            reward, discount = n_step(rewards, steps, gamma)
        at, at_next = torch.from_numpy(index), torch.from_numpy(self._next[last])
        columns = {path: x.index_select(0, at) for path, x in self._tensors.items() if not path.startswith("state")}
        columns |= {"index": at, "discount": torch.as_tensor(discount)}
        columns |= self._extras(index, index)
        if weight is not None:
            columns["weight"] = torch.from_numpy(weight)
        next_ = {path: self._tensors[path].index_select(0, at_next) for path in self._obs_paths}
        next_ |= {
            "reward": torch.as_tensor(reward),
            "terminated": torch.from_numpy((self._flags[last] & TERMINATED) != 0),
        }
        return TensorDict({**nest(columns), "next": nest(next_)}, [num])

    def _follow(self, index: np.ndarray, wanted: np.ndarray, most: int) -> tuple[np.ndarray, Tensor, Tensor]:
        """The last row of each chain of at most `wanted` transitions, their rewards [M, most] and their number."""
        rewards = np.zeros((len(index), most), np.float32)
        rewards[:, 0] = self._reward[index]
        steps, last = np.ones(len(index), np.int64), index
        goes_on = np.ones(len(index), np.bool_)
        for k in range(1, most):
            following = self._next[last]
            goes_on &= (self._flags[last] & DONE == 0) & (self._flags[following] & TRANSITION != 0) & (k < wanted)
            if not goes_on.any():
                break
            last = np.where(goes_on, following, last)
            rewards[:, k] = np.where(goes_on, self._reward[last], 0.0)
            steps += goes_on
        return last, torch.from_numpy(rewards), torch.from_numpy(steps)

    def sample_sequences(
        self,
        num: int,
        *,
        length: int,
        burn_in: int = 0,
        gamma: float = 1.0,
        num_steps: tuple[int, int] = (1, 1),
        beta: float = 0.0,
    ) -> TensorDict:
        """Sequences [S, L] of one episode each, for policies with memory.

        Keys: `observation, action, is_init, mask, discount, bootstrap_row` and, under "next", `reward` and
        `terminated`, each [S, L, ...], of which the last four are as in `sample`: row t sums the rewards of the rows t
        to `bootstrap_row[t]`. `state` [S, ...] before the first step, as it was when the runner was there; `index`
        [S]; `weight` [S] if prioritised.

        The next observation of row t is row t+1's; that of the last row is `last_observation` [S]. Where the episode
        ends, or has not gone on yet, the rest is padding, with `mask` False; the first row of it holds the last next
        observation. With `burn_in` there is such a part as `Policy.features` takes it.

        Args:
            num: S.
            length: L.
            burn_in: K, steps before each sequence.
            gamma, num_steps, beta: as in `sample`, but the number of steps is drawn once for all rows.
        """
        index, weight = self._draw(num, beta)
        return self.sequences(index, weight, length=length, burn_in=burn_in, gamma=gamma, num_steps=num_steps)

    def sequences(
        self,
        index: np.ndarray,
        weight: np.ndarray | None = None,
        *,
        length: int,
        burn_in: int = 0,
        gamma: float = 1.0,
        num_steps: tuple[int, int] = (1, 1),
    ) -> TensorDict:
        """The sequences that begin at rows [S], as `sample_sequences` gives them."""
        num = len(index)
        rows, mask = np.empty((num, length), np.int64), np.empty((num, length), np.bool_)
        row, goes_on = index, np.ones(num, np.bool_)
        for t in range(length):
            rows[:, t], mask[:, t] = row, goes_on
            following = self._next[row].astype(np.int64)
            ended = self._flags[row] & DONE != 0
            row = np.where(goes_on, following, row)
            goes_on = goes_on & ~ended & (self._flags[following] & TRANSITION != 0)
        flags = np.where(mask, self._flags[rows], 0)
        at = torch.from_numpy(rows)
        columns: dict[str, Any] = {}
        for path, tensor in self._tensors.items():
            columns[path] = tensor[at[:, 0] if path.startswith("state") else at]
            if path.startswith("observation"):
                columns[f"last_{path}"] = tensor[torch.from_numpy(row)]
        reward = torch.from_numpy(np.where(mask, self._reward[rows], np.float32(0)))
        end = flags & DONE != 0
        end[:, :-1] |= ~mask[:, 1:]
        steps = int(self.rng.integers(num_steps[0], num_steps[1] + 1))
        reward, discount, bootstrap_row = n_step_in_sequences(reward, torch.from_numpy(end), gamma, steps)
        terminated = torch.from_numpy(flags & TERMINATED != 0).gather(1, bootstrap_row)
        columns |= {"is_init": torch.from_numpy(flags & IS_INIT != 0), "mask": torch.from_numpy(mask)}
        columns |= {"discount": discount, "bootstrap_row": bootstrap_row}
        columns["index"] = torch.from_numpy(index)
        columns |= self._extras(index, rows)
        if weight is not None:
            columns["weight"] = torch.from_numpy(weight)
        batch = {**nest(columns), "next": {"reward": reward, "terminated": terminated}}
        if burn_in:
            batch["burn_in"] = self._before(index, burn_in)
        return TensorDict(batch, [num])

    def _extras(self, index: np.ndarray, rows: np.ndarray) -> dict[str, Tensor]:
        """What a minibatch has besides, by path.

        Args:
            index: rows of its transitions [M], or with which its sequences begin [S].
            rows: of its transitions [M], or of all steps of its sequences [S, L].
        """
        return {}

    def _before(self, index: np.ndarray, burn_in: int) -> TensorDict:
        """The `burn_in` steps before each row. Where the episode is younger, its first row is there several times."""
        assert self._previous is not None
        rows, is_init = np.empty((len(index), burn_in), np.int64), np.zeros((len(index), burn_in), np.bool_)
        row, real = index, np.ones(len(index), np.bool_)
        first = self._flags[row] & IS_INIT != 0
        for k in reversed(range(burn_in)):
            previous = self._previous[row].astype(np.int64)
            there = (previous >= 0) & (self._next[previous] == row) & (self._flags[previous] & TRANSITION != 0)
            real &= there | first
            row = np.where(first | ~there, row, previous)
            first = self._flags[row] & IS_INIT != 0
            rows[:, k], is_init[:, k] = row, first
        at = torch.from_numpy(rows)
        columns: dict[str, Any] = {
            path: tensor[at if path.startswith("observation") else at[:, 0]]
            for path, tensor in self._tensors.items()
            if not path.startswith("action")
        }
        columns |= {"is_init": torch.from_numpy(is_init), "real": torch.from_numpy(real)}
        return TensorDict(nest(columns), [len(index)])

    def update_priorities(self, index: Tensor, td_error: Tensor) -> None:
        """Make the transitions at `index` [M] as probable as their absolute TD errors [M] say.

        One whose error is not finite is hardly drawn again.
        """
        if self._tree is None:
            return
        error = td_error.detach().cpu().double().abs().numpy()
        priority = np.where(np.isfinite(error), error, 0.0) + SMALLEST_PRIORITY
        rows = index.cpu().numpy()
        here = self._flags[rows] & TRANSITION != 0  # not overwritten meanwhile
        rows, priority = rows[here], priority[here]
        if len(rows):
            self._max_priority = max(self._max_priority, float(priority.max()))
            self._tree.set(rows, priority**self._alpha)

    def _draw(self, num: int, beta: float) -> tuple[np.ndarray, np.ndarray | None]:
        """Rows [M] that are transitions, and importance weights of at most 1 if they are prioritised."""
        if not self._num_transitions:
            raise ReplayError("The replay buffer is empty: nothing can be drawn from it.")
        if self._tree is not None:
            index = self._tree.sample(num, self.rng)
            probability = self._tree.leaves[index] / self._tree.total
            weight = (self._num_transitions * probability) ** -beta  # section 3.4 of the paper
            return index, (weight / weight.max()).astype(np.float32)
        size = min(self._written, self.capacity)
        index = self.rng.integers(size, size=num)
        missed = self._flags[index] & TRANSITION == 0
        while np.count_nonzero(missed):
            index[missed] = self.rng.integers(size, size=int(missed.sum()))
            missed = self._flags[index] & TRANSITION == 0
        return index, None

    # --- checkpoints --------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the rows that changed since the last call into `folder`; returns the rest of the state, plain data.

        Its `files` are all files in `folder` that belong to the state, new or as they were: name, size and SHA-256.
        """
        size = min(self._written, self.capacity)
        files = self._snapshots.write(folder, self._saved(), size, whole=self._priorities())
        return {
            "capacity": self.capacity,
            "written": self._written,
            "open": [[env, number, begins] for env, (number, begins) in self._open.items()],
            "max_priority": self._max_priority,
            "alpha": self._alpha,
            "rng": self.rng.bit_generator.state,
            "files": files,
        }

    def load(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Go on from what `save` wrote and returned.

        Raises:
            CheckpointError: if a file is missing or damaged.
            ReplayError: if the buffer was of another size.
        """
        if state["capacity"] != self.capacity:
            raise ReplayError(
                f"buffer_size={self.capacity}: the checkpoint's replay buffer has {state['capacity']} rows. Resume "
                f"with buffer_size={state['capacity']}."
            )
        size = min(state["written"], self.capacity)
        if self._disk is not None:
            self._disk.reserve(size)
        whole = self._snapshots.read(folder, state["files"], self._saved())
        self._written, self._max_priority = state["written"], state["max_priority"]
        self._open = {env: (number, begins) for env, number, begins in state["open"]}
        self.rng.bit_generator.state = state["rng"]
        self._num_transitions = int(np.count_nonzero(self._flags & TRANSITION))
        if self._tree is not None:
            rows = np.flatnonzero(self._flags[:size] & TRANSITION)
            if state["alpha"]:  # what was stored is a priority to the power of it
                self._tree.set(rows, whole["priorities"].numpy()[rows] ** (self._alpha / state["alpha"]))
            else:
                self._tree.set(rows, self._max_priority**self._alpha)

    def _saved(self) -> dict[str, np.ndarray]:
        """What is saved row by row."""
        columns = {**self._columns, "reward": self._reward, "flags": self._flags, "next_row": self._next}
        return columns if self._previous is None else {**columns, "previous_row": self._previous}

    def _priorities(self) -> dict[str, np.ndarray]:
        """What changes everywhere, and is saved whole."""
        return {} if self._tree is None else {"priorities": self._tree.leaves[: min(self._written, self.capacity)]}


def _of_equal_length(
    rows: Mapping[str, np.ndarray], envs: np.ndarray
) -> Iterator[tuple[dict[str, np.ndarray], list[int]]]:
    """A fragment's environments that have steps, without padding: those of each `length`, and their numbers."""
    for length in np.unique(rows["length"][rows["length"] > 0]):
        these = rows["length"] == length
        part = {path: array[these] for path, array in rows.items() if path != "length"}
        for path, array in part.items():
            if not path.startswith(("last_", "final_")):
                part[path] = array[:, :length]
        yield part, envs[these].tolist()
