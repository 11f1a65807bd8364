"""Which policies a run began with, and which came and went since."""

from collections.abc import Mapping, Sequence
from typing import Any


class Register:
    """Gives every policy of a run a number that no other one has, also if it has the id of one that was removed.

    >>> register = Register(["one", "two"]).changed(["one"]).changed(["one", "two"])
    >>> register.numbers, register.added, register.removed
    ({'one': 0, 'two': 2}, {'two': 2}, ['two'])

    Args:
        ids: of the policies that the run begins with.

    Attributes:
        original: these ids.
        numbers: by id, of the policies that there are.
        is_mapping_changed: whether the mapping is another one than that the run began with.
    """

    def __init__(self, ids: Sequence[str]):
        self.original = list(ids)
        self.numbers = {policy_id: number for number, policy_id in enumerate(ids)}
        self.is_mapping_changed = False
        self._next = len(self.numbers)

    def changed(self, ids: Sequence[str], *, mapping: bool = False) -> "Register":
        """The register after policies were removed, or others were added, so that there are these.

        Args:
            ids: of all policies; of one that was there before it is the same one.
            mapping: whether the mapping was changed.
        """
        register = self.from_state(self.state())
        register.numbers = {policy_id: n for policy_id, n in self.numbers.items() if policy_id in ids}
        for policy_id in ids:
            if policy_id not in register.numbers:
                register.numbers[policy_id] = register._next
                register._next += 1
        register.is_mapping_changed |= mapping
        return register

    @property
    def added(self) -> dict[str, int]:
        """The numbers of the policies that the run did not begin with."""
        return {policy_id: n for policy_id, n in self.numbers.items() if n >= len(self.original)}

    @property
    def removed(self) -> list[str]:
        """The ids of policies that the run began with and that are not there any more."""
        return [policy_id for n, policy_id in enumerate(self.original) if self.numbers.get(policy_id) != n]

    def is_of(self, ids: Sequence[str]) -> bool:
        """Whether a run that has policies of these ids may be this one: those it began with, or those it has.

        Some of those that were added may be among them, or be left out.
        """
        own = [policy_id for policy_id in ids if policy_id not in self.added]
        began = [policy_id for policy_id in self.original if policy_id not in self.added]
        return own in (began, [policy_id for policy_id in self.numbers if policy_id not in self.added])

    def state(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "original": list(self.original),
            "numbers": dict(self.numbers),
            "next": self._next,
            "is_mapping_changed": self.is_mapping_changed,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Register":
        """What `state` described."""
        register = cls(state["original"])
        register.numbers, register._next = dict(state["numbers"]), state["next"]
        register.is_mapping_changed = state["is_mapping_changed"]
        return register
