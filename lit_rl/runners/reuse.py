"""Rollouts that are learned from more than once."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lit_rl.rollout import Rollout
from lit_rl.runners.fragment import Fragment


@dataclass
class _Entry:
    batch: Rollout
    uses: int = 1


class CircularBuffer:
    """The last batches, each of which is learned from several times: Luo et al. 2020, arXiv:1912.00167, section 3.

    Args:
        num_batches: kept at a time.
        num_uses: of each batch; fewer where newer ones take its place before.
    """

    def __init__(self, num_batches: int, num_uses: int):
        self._num_uses = num_uses
        self._entries: deque[_Entry] = deque(maxlen=num_batches)  # that used longest ago first
        self._due = 0

    @property
    def is_due(self) -> bool:
        """Whether a repeat comes before the next new batch."""
        return bool(self._due and self._entries)

    def add(self, batch: Rollout) -> None:
        """Keep a batch that is learned from now."""
        self._due = self._num_uses - 1
        if self._due:
            self._entries.append(_Entry(batch))

    def repeat(self) -> Rollout:
        """The batch that was used longest ago, marked as one that is not new."""
        entry = self._entries.popleft()
        entry.uses += 1
        self._due -= 1
        if entry.uses < self._num_uses:
            self._entries.append(entry)
        repeated = Rollout(dict(entry.batch.items()), entry.batch.batch_size)
        repeated["is_new"] = entry.batch["is_init"].new_zeros(len(entry.batch))
        return repeated

    def drop_older(self, version: int) -> None:
        """Forget batches with rows of versions before this one."""
        self._entries = deque(
            (entry for entry in self._entries if entry.batch["policy_version"].min() >= version),
            maxlen=self._entries.maxlen,
        )

    def clear(self) -> None:
        self._entries.clear()
        self._due = 0


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
            rows = fragment.rows._replace(buffer=fragment.rows.buffer.copy())
            finals = fragment.finals._replace(buffer=fragment.finals.buffer.copy())
            self._fragments.append(fragment._replace(rows=rows, finals=finals, episodes=[], failures=()))
