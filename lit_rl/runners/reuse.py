"""Rollouts that are learned from more than once."""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lit_rl.rollout import Rollout, Rollouts, map_rollouts
from lit_rl.runners.fragment import Fragment
from lit_rl.runners.transport import Packed


class _Kept(NamedTuple):
    batch: Rollout | Rollouts
    oldest: int


class CircularBuffer:
    """The last batches, each of which is learned from several times: Luo et al. 2020, arXiv:1912.00167, section 3.

    Every new batch is followed by as many repeats. Those of one batch are spread evenly over the time that it is kept.

    Args:
        num_batches: kept at a time.
        num_uses: of each batch.
    """

    def __init__(self, num_batches: int, num_uses: int):
        self._num_batches = num_batches
        self._kept: deque[_Kept | None] = deque(maxlen=num_batches)  # the newest first; None: nothing to repeat
        self._ages = [use * (num_batches - 1) // (num_uses - 1) for use in range(1, num_uses)]  # in newer batches
        self._due: deque[_Kept] = deque()

    @property
    def is_due(self) -> bool:
        """Whether a repeat comes before the next new batch."""
        return bool(self._due)

    def add(self, batch: Rollout | Rollouts, oldest: int = 0) -> None:
        """Keep a batch that is learned from now, whose rows are of policy version `oldest` and later ones."""
        self._push(_Kept(batch, oldest))

    def finish(self) -> None:
        """No new batch comes any more: the repeats that are left are due."""
        for _ in range(self._num_batches - 1):
            self._push(None)

    def repeat(self) -> Rollout | Rollouts:
        """The batch that is due, marked as one that is not new."""
        return map_rollouts(_not_new, self._due.popleft().batch)

    def drop_older(self, version: int) -> None:
        """Forget batches with rows of versions before this one."""
        for i, kept in enumerate(self._kept):
            if kept is not None and kept.oldest < version:
                self._kept[i] = None
        self._due = deque(kept for kept in self._due if kept.oldest >= version)

    def clear(self) -> None:
        self._kept.clear()
        self._due.clear()

    def _push(self, newest: _Kept | None) -> None:
        if self._ages:
            self._kept.appendleft(newest)
            again = [self._kept[age] for age in self._ages if age < len(self._kept)]
            self._due += [kept for kept in again if kept is not None]


class FragmentReplay:
    """Past fragments, some of which join every batch: Espeholt et al. 2018, arXiv:1802.01561, section 5.2.2.

    Args:
        fraction: of each batch's fragments, the mean over batches.
        num_fragments: kept at a time.
        seed: of what is drawn.
    """

    def __init__(self, fraction: float, num_fragments: int, seed: np.random.SeedSequence):
        self._per_new = fraction / (1 - fraction)
        self._fragments: deque[Fragment] = deque(maxlen=num_fragments)
        self._rng = np.random.default_rng(seed)
        self._owed = 0.0

    def draw(self, num_new: int, oldest: int = 0) -> list[Fragment]:
        """What joins `num_new` new fragments; none of a policy version before `oldest`."""
        fragments = [fragment for fragment in self._fragments if fragment.policy_version >= oldest]
        self._owed += num_new * self._per_new
        count = int(self._owed + 1e-9)
        self._owed -= count
        return [fragments[i] for i in self._rng.integers(len(fragments), size=count)] if fragments else []

    def add(self, fragments: Sequence[Fragment]) -> None:
        """Keep fragments: a copy, since their memory is Ray's."""
        for fragment in fragments:
            parts = fragment.parts and {
                policy_id: part._replace(rows=_own(part.rows), finals=_own(part.finals))
                for policy_id, part in fragment.parts.items()
            }
            rows, finals = _own(fragment.rows), _own(fragment.finals)
            self._fragments.append(fragment._replace(rows=rows, finals=finals, parts=parts, episodes=[], failures=()))


def _not_new(rollout: Rollout) -> Rollout:
    again = Rollout(dict(rollout.items()), rollout.batch_size)
    again["is_new"] = rollout["is_init"].new_zeros(len(rollout))
    again.has_rows = rollout.has_rows
    return again


def _own(packed: Packed) -> Packed:
    return packed._replace(buffer=packed.buffer.copy())
