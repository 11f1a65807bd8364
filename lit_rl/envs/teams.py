"""Wrappers for teams: agents that share their rewards, and agents that act as one."""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import gymnasium as gym

from lit_rl.envs.groups import Group
from lit_rl.envs.multi_agent import ActionMasksFromInfo, MultiAgentEnv, MultiAgentWrapper, has_masks_in_info
from lit_rl.errors import OptionError
from lit_rl.observations import short
from lit_rl.roster import is_pattern, may_match

ENDS = ("together", "first", "last")
Patterns = str | Sequence[str]


class TeamReward(MultiAgentWrapper):
    """Mixes the reward of each agent with the mean reward of its team.

    An agent gets (1 - weight) * own + weight * mean. The mean is over the members of its team that are in the episode:
    they had an observation, and did not leave before this step. The sum over all agents stays what it was. Agents
    without a team keep their rewards, and so do those that are not in the episode.

    Args:
        env: the environment inside.
        team: whose rewards are mixed: a pattern of agents' ids, several in a list, or for several teams a dict with the
            pattern or the list of each.
        weight: from 0, own rewards, to 1, the team's.

    Raises:
        OptionError: if the weight is out of range, a pattern matches nobody, or an agent is in two teams.
    """

    def __init__(self, env: MultiAgentEnv, team: Patterns | Mapping[str, Patterns] = "*", weight: float = 1.0):
        super().__init__(env)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= 1:
            raise OptionError(f"TeamReward: weight={short(weight)}: expected a number from 0 to 1.")
        teams = team if isinstance(team, Mapping) else {"team": team}
        self._weight = float(weight)
        self._teams = {name: _patterns(f"TeamReward: team={short(team)}", given) for name, given in teams.items()}
        names = list(self.possible_agents)
        for pattern in (pattern for patterns in self._teams.values() for pattern in patterns):
            if not any(may_match(pattern, name) for name in names):
                raise OptionError(f"TeamReward: the pattern {pattern!r} matches none of the agents {short(names)}.")
        for name in names:
            self._team_of(name)
        self._there: dict[str, str | None] = {}  # of each agent that is in the episode: its team

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        obs, info = super().reset(seed=seed, options=options)
        self._there = {agent: self._team_of(agent) for agent in obs}
        return obs, info

    def step(self, actions: dict[str, Any]) -> tuple[dict, dict, dict, dict, dict]:
        obs, reward, terminated, truncated, info = super().step(actions)
        mixed = self._mixed(reward)
        for agent in {**obs, **terminated, **truncated}:
            if terminated.get(agent) or truncated.get(agent):
                self._there.pop(agent, None)
            elif agent in obs and agent not in self._there:
                self._there[agent] = self._team_of(agent)
        return obs, mixed, terminated, truncated, info

    def _mixed(self, reward: dict[str, Any]) -> dict[str, Any]:
        members: dict[str, list[str]] = {}
        for agent, team in self._there.items():
            if team is not None:
                members.setdefault(team, []).append(agent)
        mixed = dict(reward)
        for there in members.values():
            try:
                own = {agent: float(reward.get(agent, 0.0)) for agent in there}
            except (TypeError, ValueError):  # no number: the check after this says so
                continue
            mean = math.fsum(own.values()) / len(own)  # the same in whatever order they are
            mixed |= {agent: (1 - self._weight) * x + self._weight * mean for agent, x in own.items()}
        return mixed

    def _team_of(self, agent: str) -> str | None:
        found = [team for team, patterns in self._teams.items() if any(fnmatchcase(agent, x) for x in patterns)]
        if len(found) > 1:
            raise OptionError(f"TeamReward: the agent {agent!r} is in the teams {found}: expected one at most.")
        return found[0] if found else None


class GroupAgents(MultiAgentWrapper):
    """Makes each group of agents one agent, which sees what all members see and chooses all their actions.

    Its observations are a Tuple of the members', its actions a Tuple of their actions, and its reward is the sum of
    theirs. Members whose observations have an `action_mask` give a Dict: `observation` is the Tuple of the rest, and
    `action_mask` a Dict of the masks by the member's place, "0", "1", ... Agents without a group stay as they are.

    All members act when one of them is to act. One that waits then, or left, does not: its action is not passed on, and
    its mask, if it has one, allows its first action alone. While it waits it shows what it saw last; before it appears,
    and after it left, zeros, or what is nearest to them in its space.

    If members leave at different times, `ends` says what becomes of the group:

    - "together": that is an error;
    - "last": it stays until the last one leaves. It is terminated if every member was terminated, and truncated
      otherwise. The value that is bootstrapped is then that of an observation with the final one of each member that
      was truncated, and zeros for each that was terminated.
    - "first": it leaves with the first one, which ends the episode, so all agents must be in one group. It is
      terminated if a member that left was terminated, since the group would then have left in any case, and truncated
      otherwise. The value that is bootstrapped is then that of what all members see.

    Args:
        env: the environment inside.
        groups: the ids of the members by the name of the group, in order; patterns stand for all they match.
        ends: see above.

    Raises:
        OptionError: if a group is empty or its name is taken, a pattern matches nobody or agents that are not known
            beforehand, or an agent is in two groups.
        SpaceError: if a mask does not fit its action.
    """

    def __init__(self, env: MultiAgentEnv, groups: Mapping[str, Patterns], ends: str = "together"):
        if ends not in ENDS:
            raise OptionError(f"GroupAgents: ends={short(ends)}: expected one of {', '.join(map(repr, ENDS))}.")
        if not isinstance(groups, Mapping) or not groups:
            raise OptionError(f"GroupAgents: groups={short(groups)}: expected a dict with the members of each group.")
        super().__init__(ActionMasksFromInfo(env) if has_masks_in_info(env) else env)
        names = list(self.possible_agents)
        self._group_of: dict[str, str] = {}
        self._groups: dict[str, Group] = {}
        for group, given in groups.items():
            for member in (members := _members(group, given, names)):
                if member in self._group_of:
                    both = [self._group_of[member], group]
                    raise OptionError(f"GroupAgents: {member!r} is in the groups {both}: expected one at most.")
                self._group_of[member] = group
            self._groups[group] = Group(group, members, self.env, ends)
        for group in self._groups:
            if not isinstance(group, str) or is_pattern(group) or (group in names and group not in self._group_of):
                raise OptionError(
                    f"GroupAgents: a group is called {group!r}: expected a name without wildcards, which no agent that "
                    "is in no group has."
                )
        self.possible_agents = list(dict.fromkeys(self._group_of.get(name, name) for name in names))
        if ends == "first" and len(self.possible_agents) > 1:
            raise OptionError(
                "GroupAgents: ends='first' ends the episode as soon as a member leaves: expected one group of all "
                f"agents, got {short(self.possible_agents)}. Use ends='last'."
            )

    def observation_space(self, agent: str) -> gym.Space:
        group = self._groups.get(agent)
        return self.env.observation_space(agent) if group is None else group.observation_space

    def action_space(self, agent: str) -> gym.Space:
        group = self._groups.get(agent)
        return self.env.action_space(agent) if group is None else group.action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        obs, info = self.env.reset(seed=seed, options=options)
        for group in self._groups.values():
            group.begin()
        obs, _, _, _, info = self._grouped(obs, {}, {}, {}, info)
        return obs, info

    def step(self, actions: dict[str, Any]) -> tuple[dict, dict, dict, dict, dict]:
        given: dict[str, Any] = {}
        for agent, action in actions.items():
            group = self._groups.get(agent)
            given |= {agent: action} if group is None else group.actions_of(action)
        return self._grouped(*self.env.step(given))

    def _grouped(
        self, obs: dict, reward: dict, terminated: dict, truncated: dict, info: dict
    ) -> tuple[dict, dict, dict, dict, dict]:
        """What a step returned, with groups in the place of their members."""
        given = obs, reward, terminated, truncated, info
        of_all = tuple({agent: x for agent, x in part.items() if agent not in self._group_of} for part in given)
        for name, group in self._groups.items():
            for part, value in zip(of_all, group.take(*given)):
                if value is not None:
                    part[name] = value
        return of_all  # type: ignore[return-value]


def _patterns(option: str, given: Any) -> list[str]:
    """Patterns of agents, of one or of a list."""
    patterns = [given] if isinstance(given, str) else given
    if not isinstance(patterns, Sequence) or not patterns or not all(isinstance(x, str) for x in patterns):
        raise OptionError(f"{option}: expected an agent's id or a pattern, or a list of them.")
    return list(patterns)


def _members(group: str, given: Any, names: Sequence[str]) -> list[str]:
    """The agents of a group, in the order of its patterns, each once."""
    found: dict[str, None] = {}
    for pattern in _patterns(f"GroupAgents: groups[{group!r}]={short(given)}", given):
        unknown = [x for x in names if is_pattern(x) and may_match(pattern, x)]
        if unknown:
            raise OptionError(
                f"GroupAgents: {pattern!r} of the group {group!r} matches agents of {unknown[0]!r}: expected agents "
                "whose ids are known beforehand, each an entry of possible_agents."
            )
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            raise OptionError(
                f"GroupAgents: {pattern!r} of the group {group!r} matches none of the agents {short(list(names))}."
            )
        found |= dict.fromkeys(matched)
    return list(found)
