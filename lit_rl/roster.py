"""Which agents there may be in a multi-agent environment, and where they are put."""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

WILDCARDS = frozenset("*?[")
PIECES = re.compile(r"\[!?\]?[^]]*\]|.", re.DOTALL)  # of a pattern: a set of characters, a wildcard or a character


class Roster:
    """Which agents there may be, and how many at a time.

    Args:
        possible_agents, max_agents: those of the environment.

    Attributes:
        names: `possible_agents`; what metrics of agents are named by.
        num_slots: agents at a time, at most.
    """

    def __init__(self, possible_agents: Sequence[str], max_agents: int | None):
        self.names = tuple(possible_agents)
        self._patterns = [name for name in self.names if is_pattern(name)]
        known = [name for name in self.names if not is_pattern(name)]
        self._slots = {name: slot for slot, name in enumerate(known)}
        self.num_slots = len(known) + (max_agents or 0 if self._patterns else 0)

    def name_of(self, agent: str) -> str | None:
        """The entry of `possible_agents` that an agent is, the first if there are several; None if there is none."""
        if agent in self._slots:
            return agent
        return next((pattern for pattern in self._patterns if fnmatchcase(agent, pattern)), None)

    def slots_of(self, names: Sequence[str]) -> list[int]:
        """Where agents of some of `names` may be put."""
        found = [slot for name, slot in self._slots.items() if name in names]
        return found + (list(range(len(self._slots), self.num_slots)) if any(map(is_pattern, names)) else [])

    def free_slot(self, agent: str, taken: Mapping[str, int]) -> int | None:
        """Where an agent that appears is put: always in the same slot if it is known beforehand.

        Args:
            agent: its id.
            taken: the slots of the agents that are there.
        """
        slot = self._slots.get(agent)
        if slot is not None:
            return slot
        used = set(taken.values())
        return next((slot for slot in range(len(self._slots), self.num_slots) if slot not in used), None)


def is_pattern(name: str) -> bool:
    """Whether an entry of `possible_agents` stands for several agents."""
    return not WILDCARDS.isdisjoint(name)


def may_match(pattern: str, name: str) -> bool:
    """Whether there may be an agent of an entry of `possible_agents` whose id matches a pattern.

    >>> may_match("wolf_*", "*_1"), may_match("wolf_*", "sheep_*")
    (True, False)
    """
    if not is_pattern(name):
        return fnmatchcase(name, pattern)
    return _have_common(PIECES.findall(pattern), PIECES.findall(name))


def matches_all(pattern: str, name: str) -> bool:
    """Whether every agent of an entry of `possible_agents` matches a pattern, as far as that is easily seen.

    >>> matches_all("wolf_*", "wolf_old_*"), matches_all("wolf_*", "w*")
    (True, False)
    """
    if not is_pattern(name):
        return fnmatchcase(name, pattern)
    pieces = ["\0" if is_pattern(piece) else piece for piece in PIECES.findall(name)]  # which only a "*" stands for
    has_stars_alone = not is_pattern(pattern.replace("*", ""))
    return pattern == name or (has_stars_alone and fnmatchcase("".join(pieces), pattern))


def _have_common(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether a text may match both of two patterns, in pieces. Two sets of characters have one in common."""
    reached = {(0, 0)}  # the numbers of pieces of both that a text may match
    for i in range(len(one) + 1):
        for j in range(len(other) + 1):
            if (i, j) not in reached:
                continue
            a, b = "".join(one[i : i + 1]), "".join(other[j : j + 1])  # "" at the end
            if "*" in (a, b):
                reached |= {(i + 1, j), (i, j + 1)}
            elif (is_pattern(a) and is_pattern(b)) or fnmatchcase(a, b) or fnmatchcase(b, a):
                reached.add((i + 1, j + 1))
    return (len(one), len(other)) in reached
