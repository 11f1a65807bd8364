"""Which agents there may be in a multi-agent environment, and where they are put."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

WILDCARDS = frozenset("*?[")


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
