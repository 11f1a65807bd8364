"""Puts what env runners collect together to whole episodes.

Shapes: B environments, T steps of a fragment, L steps of an episode.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lit_rl.runners.fragment import Fragment

Arrays = dict[str, np.ndarray]


class Assembled(NamedTuple):
    """An episode from its beginning to its end.

    Attributes:
        steps: [L, ...]: `observation` and `action` by path, the action as recorded; `reward` as the environment gave
            it; `terminated, truncated, log_prob, policy_version`.
        final: the final observation [...], by path.
        origin: its runner, the environment in it, and how many env steps this had made before the last one.
    """

    steps: Arrays
    final: Arrays
    origin: tuple[int, int, int]


class Assembler:
    """Follows each environment of each runner of one agent through its fragments.

    An environment that failed ends its episode by truncation before the step that failed, as it does for the learner.

    Args:
        every: of the episodes that begin, the first and every so many after it are kept.

    Attributes:
        begun: episodes that began so far.
        broken: episodes to be kept that were broken off, since their runner died or all its environments were rebuilt.
    """

    def __init__(self, every: int = 1):
        self._every = every
        self.begun = self.broken = 0
        self._open: dict[tuple[int, int], list[Arrays]] = {}  # the parts of the episodes under way, of those kept

    @property
    def under_way(self) -> int:
        """Episodes to be kept that have not ended."""
        return len(self._open)

    def add(self, fragments: Sequence[tuple[int, Fragment]], step: int) -> Iterator[Assembled]:
        """The episodes that end in fragments, each after its runner, those of a runner in order.

        Args:
            fragments: the next ones.
            step: env steps of each environment before them.
        """
        for runner, fragment in fragments:
            rows, finals = fragment.rows.views(), fragment.finals.views()
            columns = {name: x for name, x in rows.items() if name.partition("/")[0] in ("observation", "action")}
            columns |= {name: rows[name] for name in ("terminated", "truncated")}
            columns["reward"] = rows["reward"] if fragment.reward is None else fragment.reward
            columns["log_prob"] = rows["action_log_prob"]
            columns["policy_version"] = np.full(rows["reward"].shape, fragment.policy_version)
            mask = rows["mask"] if "mask" in rows else finals.get("mask", np.ones_like(rows["is_init"]))
            stops = rows["is_init"] | rows["terminated"] | rows["truncated"] | ~mask
            for b in range(len(stops)):
                ended = self._follow((runner, b), rows, finals, columns, mask[b], np.flatnonzero(stops[b]).tolist())
                for t, steps, final in ended:
                    yield Assembled(steps, final, (runner, b, step + t))

    def _follow(
        self, who: tuple[int, int], rows: Arrays, finals: Arrays, columns: Arrays, mask: np.ndarray, stops: list[int]
    ) -> Iterator[tuple[int, Arrays, Arrays]]:
        """The episodes of an environment that end in a fragment: the last step, the steps and the final observation."""
        b, begin = who[1], 0

        def part(end: int) -> Arrays:
            return {name: column[b, begin:end].copy() for name, column in columns.items()}

        for t in stops:
            if rows["is_init"][b, t] and mask[t]:
                self.broken += self._open.pop(who, None) is not None
                if self.begun % self._every == 0:
                    self._open[who] = []
                self.begun += 1
                begin = t
            if not mask[t]:  # no step: the environment failed, or was reset after the last one
                if who in self._open:
                    yield t, *self._end(who, part(t), _at(rows, "", (b, t)))
                begin = t + 1
            elif rows["terminated"][b, t] or rows["truncated"][b, t]:
                if who in self._open:
                    yield t, *self._end(who, part(t + 1), _final(rows, finals, b, t))
                begin = t + 1
        if who in self._open and begin < len(mask):
            self._open[who].append(part(len(mask)))

    def _end(self, who: tuple[int, int], last: Arrays, final: Arrays) -> tuple[Arrays, Arrays]:
        parts = [*self._open.pop(who), last]
        steps = {name: np.concatenate([one[name] for one in parts]) for name in last}
        steps["truncated"][-1] |= not steps["terminated"][-1]  # where an environment failed nothing says so
        return steps, final


def _final(rows: Arrays, finals: Arrays, b: int, t: int) -> Arrays:
    """The observation with which environment b's episode ended in step t."""
    found = np.flatnonzero(finals["final_step"][b] == t)
    if len(found):
        return _at(finals, "final_", (b, int(found[0])))
    if t + 1 < rows["reward"].shape[1]:
        return _at(rows, "", (b, t + 1))  # the row after it is no step, and has what was observed last
    return _at(rows, "last_", b)


def _at(arrays: Arrays, prefix: str, at: int | tuple[int, int]) -> Arrays:
    name = f"{prefix}observation"
    return {path.removeprefix(prefix): x[at].copy() for path, x in arrays.items() if path.partition("/")[0] == name}
