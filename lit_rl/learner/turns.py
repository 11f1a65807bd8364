"""Algorithms that learn in turns: a function says whose turn it is."""

from collections.abc import Callable, Sequence
from typing import Any

from lit_rl.errors import OptionError


class Turns:
    """Asks a function once for each update which algorithms learn in it.

    >>> turns = Turns(lambda update: ["one"] if update < 10 else ["two"])
    >>> turns.at(9, ["one", "two"]), turns.at(10, ["one", "two"])
    (['one'], ['two'])

    Args:
        function: of the number of an update, returns the ids of policies.
    """

    def __init__(self, function: Callable[[int], Any]):
        self._function = function
        self._last: tuple[int, list[str]] | None = None  # a number, and what was returned for it

    def at(self, update: int, trained: Sequence[str]) -> list[str]:
        """The policies that learn in an update, in the order of those that may, `trained`.

        Raises:
            OptionError: if the function raises, or returns others.
        """
        if self._last is None or self._last[0] != update:
            self._last = update, self._asked(update, trained)
        return [policy_id for policy_id in trained if policy_id in self._last[1]]

    def _asked(self, update: int, trained: Sequence[str]) -> list[str]:
        try:
            given = self._function(update)
        except Exception as error:
            raise OptionError(
                f"train raised for update {update}: {type(error).__name__}: {error}. Expected a function of an "
                "update's number that returns ids of policies."
            ) from error
        found = [given] if isinstance(given, str) else given
        is_some = isinstance(found, list | tuple | set | frozenset) and bool(found)
        if not is_some or not all(isinstance(x, str) and x in trained for x in found):
            raise OptionError(
                f"train returned {given!r} for update {update}: expected the ids of some of the policies that may "
                f"learn, {list(trained)}."
            )
        return list(found)
