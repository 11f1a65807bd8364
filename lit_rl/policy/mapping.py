"""Which policy an agent acts by."""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from lit_rl.errors import OptionError
from lit_rl.roster import is_pattern, matches_all, may_match

PROBES = 20  # episodes in which a function is asked beforehand whom it gives which policy


class EpisodeInfo(NamedTuple):
    """What a mapping may depend on, beside the agent.

    Attributes:
        number: of the episode, from 0 in each copy of the environment.
        seed: with which it was begun; None if the environment went on with its own random numbers.
        rng: random numbers for the mapping's own use.
    """

    number: int
    seed: int | None
    rng: np.random.Generator


Mapped: TypeAlias = str | Mapping[str, str] | Callable[[str, EpisodeInfo], str]


class PolicyMapping:
    """Agents to policies: one for all, by patterns, or by a function. Fixed within an episode.

    Args:
        mapping: a policy's id for all agents; `{pattern: id}`, of which the first that matches wins; or a function of
            an agent and its `EpisodeInfo`, which is called where the environment is.
        policy_ids: that there are.

    Raises:
        OptionError: if it is none of these, or names another policy.
    """

    def __init__(self, mapping: Mapped, policy_ids: Sequence[str]):
        self._ids = tuple(policy_ids)
        self.given = mapping
        self._patterns: dict[str, str] | None = None
        if isinstance(mapping, str):
            self._patterns = {"*": mapping}
        elif isinstance(mapping, Mapping):
            self._patterns = dict(mapping)
        elif not callable(mapping):
            raise OptionError(
                f"policy_mapping={mapping!r}: expected a policy's id, a dict of patterns and ids, or a function of an "
                "agent and an EpisodeInfo."
            )
        for pattern, policy_id in (self._patterns or {}).items():
            self._check(policy_id, f"for {pattern!r}")

    @property
    def plain(self) -> str | dict[str, str] | None:
        """As plain data; None if it is a function."""
        return self.given if isinstance(self.given, str) else self._patterns

    def policy_of(self, agent: str, info: EpisodeInfo) -> str:
        """The id of the policy that an agent acts by in an episode.

        Raises:
            OptionError: if there is none.
        """
        if self._patterns is None:
            return self._check(self._asked(agent, info), f"for agent {agent!r}")
        for pattern, policy_id in self._patterns.items():
            if fnmatchcase(agent, pattern):
                return policy_id
        raise _no_match(f"agent {agent!r} matches", self._patterns)

    def may_be(self, name: str) -> set[str]:
        """The policies by which an agent of an entry of `possible_agents` may act.

        Raises:
            OptionError: if there is none.
        """
        if is_pattern(name):
            return set(self._ids) if self._patterns is None else self._may_be(name, self._patterns)
        num = PROBES if self._patterns is None else 1
        rng = np.random.default_rng(0)
        return {self.policy_of(name, EpisodeInfo(number, None, rng)) for number in range(num)}

    def names_of(self, policy_id: str, names: Sequence[str]) -> list[str]:
        """The entries of `possible_agents` whose agents may act by a policy.

        Of a function these are found by asking it; all if it gave nobody the policy, as it may do later.
        """
        found = [name for name in names if policy_id in self.may_be(name)]
        return list(names) if not found and self.is_function else found

    def named(self, names: Sequence[str]) -> set[str]:
        """The policies that it names; of a function those that it gives agents of entries of `possible_agents`."""
        if self._patterns is not None:
            return set(self._patterns.values())
        return {policy_id for name in names if not is_pattern(name) for policy_id in self.may_be(name)}

    @property
    def is_function(self) -> bool:
        """Whether it is one, which may give any agent any policy."""
        return self._patterns is None

    def _may_be(self, name: str, patterns: dict[str, str]) -> set[str]:
        """By patterns, the policies of agents whose ids are known by a pattern too."""
        found = set()
        for pattern, policy_id in patterns.items():
            if may_match(pattern, name):
                found.add(policy_id)
            if matches_all(pattern, name):
                break
        if not found:
            raise _no_match(f"agents {name!r} match", patterns)
        return found

    def _asked(self, agent: str, info: EpisodeInfo) -> Any:
        assert callable(self.given)
        try:
            return self.given(agent, info)
        except Exception as error:
            raise OptionError(
                f"policy_mapping raised for agent {agent!r}: {type(error).__name__}: {error}. Expected a function of "
                "an agent and an EpisodeInfo that returns a policy's id."
            ) from error

    def _check(self, policy_id: Any, where: str) -> str:
        if policy_id not in self._ids:
            raise OptionError(f"policy_mapping: {policy_id!r} {where}: expected one of the policies {list(self._ids)}.")
        return policy_id


def _no_match(who: str, patterns: dict[str, str]) -> OptionError:
    return OptionError(f"policy_mapping: {who} none of {list(patterns)}. Add a pattern.")
