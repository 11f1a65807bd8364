"""Replay of sequences that go on across the ends of episodes.

Shapes: B sequences, L rows of each.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

from lit_rl.errors import OptionError, ReplayError
from lit_rl.replay.buffer import DONE, IS_INIT, TERMINATED, TRANSITION, ReplayBuffer
from lit_rl.spec import EnvSpec
from lit_rl.trees import iterate, nest

BEGINS = np.uint8(16)  # a bit of a row's flags, beside those of `ReplayBuffer`: a sequence begins after it
TRIES = 16  # at random, for rows after which a sequence begins


class SequenceBuffer(ReplayBuffer):
    """A `ReplayBuffer` whose rows are drawn in sequences of `length`, as an environment went through them.

    An episode of n steps has n + 1 rows, the last of which has its final observation; the next episode's first row
    follows it. A sequence begins after a row of the same environment, which gives it the action before; the state
    before it is kept. None begins with a final observation, for which no action was asked, so that the state before it
    is not known. Every row is drawn soon after it came: each environment's time is cut into sequences, which are drawn
    once each before others are drawn at random.

    Args:
        spec, capacity, storage_dir, seed: see `ReplayBuffer`.
        state: arrays [1, ...] by path: the policy's state before each row is kept.
        length: L.

    Raises:
        OptionError: if there is no room for a sequence.
    """

    def __init__(
        self,
        spec: EnvSpec,
        capacity: int,
        *,
        state: Mapping[str, np.ndarray],
        length: int,
        storage_dir: str | Path | None = None,
        seed: np.random.SeedSequence | None = None,
    ):
        if capacity < length + 2:
            raise OptionError(
                f"sequence_length={length}: expected sequences that fit into buffer_size={capacity} rows. Lower it."
            )
        super().__init__(spec, capacity, state=state, storage_dir=storage_dir, seed=seed)
        self.length = length
        # Of each environment: the numbers of its newest rows, and how many follow until a sequence is to be drawn once.
        self._newest: dict[int, deque[int]] = {}
        self._due: dict[int, int] = {}
        self._queue: deque[int] = deque()  # rows after which a sequence begins that was not drawn yet
        self._last_begin = -capacity
        self._added = self._drawn = 0  # transitions, and rows of sequences

    @property
    def ratio(self) -> float:
        """Rows drawn for each transition that came: the author's train ratio, as it is."""
        return self._drawn / max(self._added, 1)

    @property
    def can_draw(self) -> bool:
        return self._is_there(self._last_begin)

    # --- writing ------------------------------------------------------------------------------------------------

    def extend(self, rows: Mapping[str, np.ndarray], envs: Iterable[int], rollout_length: int | None = None) -> int:
        envs = list(envs)
        if "length" in rows:  # it is taken apart, and comes here again
            return super().extend(rows, envs, rollout_length)
        before = {env: self._open[env][0] for env in envs if env in self._open}
        taken = super().extend(rows, envs, rollout_length)
        self._added += taken
        counts = rows["reward"].shape[1] + (rows["final_step"] >= 0).sum(1)
        for env, count in zip(envs, counts.tolist()):
            chain = self._chain(self._open[env][0], count)
            if env not in self._newest or chain[0] != before.get(env):
                self._newest[env], self._due[env] = deque(), 0
            self._follow_rows(env, chain)
        while self._queue and not self._is_there(self._queue[0]):  # more rows come than are drawn
            self._queue.popleft()
        return taken

    def _chain(self, head: int, count: int) -> list[int]:
        """The numbers of the `count` rows before an environment's newest observation, in order."""
        assert self._previous is not None
        numbers, place = [], head % self.capacity
        for _ in range(count):
            place = int(self._previous[place])
            numbers.append(int(self._number(place)))
        return numbers[::-1]

    def _follow_rows(self, env: int, numbers: list[int]) -> None:
        """So many more rows of an environment are known: sequences of which they are the last ones can be drawn."""
        newest = self._newest[env]
        for number in numbers:
            newest.append(number)
            if len(newest) <= self.length:
                continue
            begin = newest.popleft()
            ends, next_ends = (self._flags[n % self.capacity] & DONE != 0 for n in (begin, newest[0]))
            if not ends and self._is_there(begin):
                self._flags[begin % self.capacity] |= BEGINS
                self._snapshots.touch(np.array([begin % self.capacity]))
                self._last_begin = begin
                if self._due[env] <= 0 or (self._due[env] == 1 and next_ends):  # else the final observation is left out
                    self._queue.append(begin)
                    self._due[env] = self.length
            self._due[env] -= 1

    def _number(self, place: Any) -> Any:
        """The numbers of the rows that lie at places."""
        return self._written - 1 - (self._written - 1 - place) % self.capacity

    def _is_there(self, number: Any) -> Any:
        """Whether rows were not overwritten."""
        return number >= self._written - self.capacity

    # --- drawing ------------------------------------------------------------------------------------------------

    def sample_across(self, num: int) -> TensorDict:
        """Sequences [B, L], drawn with replacement, each row that is new once at first.

        Keys: `observation, previous_action` (taken before), `reward` (received on arriving, 0 in an episode's first
        row), `is_first, is_last, is_terminal`, each [B, L, ...]; `state` [B, ...] before the first row; `following`
        [B, L], the numbers of the rows after each, for `write_states`.
        """
        begins = np.array([self._queue.popleft() for _ in range(min(num, len(self._queue)))], np.int64)
        begins = begins[self._is_there(begins)] % self.capacity
        begins = begins[self._begins(begins)]
        self._drawn += num * self.length
        return self._gather(np.concatenate([begins, self._draw_begins(num - len(begins), self.rng)]))

    def peek(self, num: int, rng: np.random.Generator) -> TensorDict:
        """Sequences as `sample_across` gives them, drawn by another generator, so that what it draws stays the same."""
        return self._gather(self._draw_begins(num, rng))

    def _gather(self, place: np.ndarray) -> TensorDict:
        """The sequences that begin after rows."""
        num = len(place)
        places = np.empty((num, self.length + 2), np.int64)
        for t in range(self.length + 2):
            places[:, t] = place
            place = self._next[place]
        before, now, following = places[:, :-2], places[:, 1:-1], places[:, 2:]
        flags, flags_before = self._flags[now], self._flags[before]
        is_last = flags & TRANSITION == 0
        is_first = (flags & IS_INIT != 0) | (flags_before & TRANSITION == 0)
        reward = np.where(is_first, np.float32(0), self._reward[before])
        columns: dict[str, Any] = {}
        for path, tensor in self._tensors.items():
            if path.startswith("state"):
                columns[path] = tensor[torch.from_numpy(now[:, 0])]
            elif path.startswith("observation"):
                columns[path] = tensor[torch.from_numpy(now)]
            else:
                columns[f"previous_{path}"] = tensor[torch.from_numpy(before)]
        columns |= {
            "reward": torch.from_numpy(reward),
            "is_first": torch.from_numpy(is_first),
            "is_last": torch.from_numpy(is_last),
            "is_terminal": torch.from_numpy(is_last & (flags_before & TERMINATED != 0)),
            "following": torch.from_numpy(self._number(following)),
        }
        return TensorDict(nest(columns), [num])

    def _draw_begins(self, num: int, rng: np.random.Generator) -> np.ndarray:
        """The places of `num` rows after which a sequence begins."""
        size = min(self._written, self.capacity)
        index = rng.integers(size, size=num)
        for _ in range(TRIES):
            missed = ~self._begins(index)
            if not np.count_nonzero(missed):
                return index
            index[missed] = rng.integers(size, size=int(missed.sum()))
        begins = np.flatnonzero(self._begins(np.arange(size)))
        if not len(begins):
            raise ReplayError(
                f"The replay buffer holds no sequence of {self.length} rows: nothing can be drawn from it."
            )
        return begins[rng.integers(len(begins), size=num)]

    def _begins(self, places: np.ndarray) -> np.ndarray:
        """After which of the rows [N] a sequence begins that is there.

        A final observation lies behind the row that follows it, which is overwritten before it: see `ReplayBuffer`.
        """
        assert self._previous is not None
        return (self._flags[places] & BEGINS != 0) & (self._previous[self._next[places]] == places)

    def write_states(self, following: torch.Tensor, states: Mapping[str, torch.Tensor]) -> None:
        """Keep states [B, L, ...] that were computed anew. What was overwritten, or is not finite, stays as it is.

        Args:
            following: numbers of the rows that they are before, [B, L].
            states: some of the parts of the policy's state.
        """
        numbers = following.cpu().numpy()
        values = {path: tensor.float().cpu().numpy() for path, tensor in iterate(states, "state")}
        here = self._is_there(numbers) & (numbers >= 0)
        for array in values.values():
            here &= np.isfinite(array).all(-1)
        places = numbers[here] % self.capacity
        for path, array in values.items():
            self._columns[path][places] = array[here]
        self._snapshots.touch(places)

    # --- checkpoints --------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> dict[str, Any]:
        newest = [[env, self._due[env], list(numbers)] for env, numbers in self._newest.items()]
        own = {"newest": newest, "queue": list(self._queue), "last_begin": self._last_begin}
        own |= {"added": self._added, "drawn": self._drawn}
        return super().save(folder) | {"length": self.length, "sequences": own}

    def load(self, folder: Path, state: Mapping[str, Any]) -> None:
        if state["length"] != self.length:
            raise ReplayError(
                f"sequence_length={self.length}: the checkpoint's replay buffer has sequences of {state['length']} "
                f"rows. Resume with sequence_length={state['length']}."
            )
        super().load(folder, state)
        own = state["sequences"]
        self._newest = {env: deque(numbers) for env, _, numbers in own["newest"]}
        self._due = {env: due for env, due, _ in own["newest"]}
        self._queue, self._last_begin = deque(own["queue"]), own["last_begin"]
        self._added, self._drawn = own["added"], own["drawn"]
