"""Several agents that act as one: what `lit_rl.envs.teams.GroupAgents` keeps of each group."""

import copy
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from lit_rl.distributions import distribution_for
from lit_rl.envs.multi_agent import MultiAgentEnv
from lit_rl.errors import EnvError
from lit_rl.masks import ACTION_MASK, ActionMasks, split_mask
from lit_rl.observations import short
from lit_rl.spec import class_counts
from lit_rl.trees import children


class Group:
    """A group in the episode under way: who of it is there, who left and why.

    Args:
        name: how messages call it.
        members: the ids, in order.
        env: theirs.
        ends: see `GroupAgents`.

    Attributes:
        observation_space, action_space: of the group.
    """

    def __init__(self, name: str, members: Sequence[str], env: MultiAgentEnv, ends: str):
        self._name, self._ends = name, ends
        self._members = [_Member(member, env) for member in members]
        self.action_space = spaces.Tuple([member.action_space for member in self._members])
        self.observation_space: gym.Space = spaces.Tuple([member.space for member in self._members])
        masks = {str(i): x.mask_space for i, x in enumerate(self._members) if x.mask_space is not None}
        self._has_masks = bool(masks)
        if masks:
            parts = {"observation": self.observation_space, ACTION_MASK: spaces.Dict(masks)}
            self.observation_space = spaces.Dict(parts)
        self.begin()

    def begin(self) -> None:
        """Nobody is there."""
        self._last: dict[str, Any] = {}  # of those that are there: what they saw last
        self._ended: dict[str, tuple[bool, bool]] = {}  # of those that left: terminated, truncated
        self._final: dict[str, Any] = {}  # of those that were truncated: the final observation
        self._infos: dict[str, Mapping[str, Any]] = {}  # the latest of each
        self._acting: set[str] = set()

    def actions_of(self, action: Sequence[Any]) -> dict[str, Any]:
        """Of the group's action those of the members that act."""
        return {member.name: part for member, part in zip(self._members, action) if member.name in self._acting}

    def take(
        self,
        obs: Mapping[str, Any],
        reward: Mapping[str, Any],
        terminated: Mapping[str, Any],
        truncated: Mapping[str, Any],
        info: Mapping[str, Any],
    ) -> tuple[Any, float | None, bool | None, bool | None, dict[str, float] | None]:
        """Take in what a step brought the members.

        Returns:
            The same of the group; None for each that it does not have.
        """
        self._infos |= {member.name: info[member.name] for member in self._members if member.name in info}
        left = []
        self._acting = set()
        for name in (member.name for member in self._members):
            flags = bool(terminated.get(name)), bool(truncated.get(name))
            if any(flags):
                if name in self._last:
                    self._leave(name, flags, obs)
                    left.append(name)
            elif name in obs:
                self._last[name] = copy.deepcopy(obs[name])  # an environment may write into what it gave
                self._ended.pop(name, None)
                self._final.pop(name, None)
                self._acting.add(name)
        if left and self._last and self._ends == "together":
            raise EnvError(
                f"GroupAgents: {left} of the group {self._name!r} left, and {list(self._last)} stayed: expected all to "
                "leave at once. Set ends='last', or 'first'."
            )
        credited, numbers = self._reward(reward), self._numbers()
        if left and (not self._last or self._ends == "first"):
            seen, *flags_of_all = self._end()
            return seen, credited, *flags_of_all, numbers
        return self._shown({}) if self._acting else None, credited, None, None, numbers

    def _leave(self, name: str, flags: tuple[bool, bool], obs: Mapping[str, Any]) -> None:
        del self._last[name]
        self._ended[name] = flags
        if flags[0]:
            return
        if name not in obs:
            raise EnvError(
                f"GroupAgents: agent {name!r} of the group {self._name!r} was truncated without an observation: "
                "expected its final one, whose value is bootstrapped."
            )
        self._final[name] = copy.deepcopy(obs[name])

    def _end(self) -> tuple[Any, bool, bool]:
        """The final observation, unless the group is terminated; whether it is terminated, and truncated."""
        flags = list(self._ended.values())
        is_terminated = (any if self._ends == "first" else all)(terminated for terminated, _ in flags)
        self._acting = set()
        final = None if is_terminated else self._shown(self._final)
        self.begin()
        return final, is_terminated, any(truncated for _, truncated in flags)

    def _shown(self, final: dict[str, Any]) -> Any:
        """What the group sees: of members that left what is in `final`."""
        seen = final | self._last
        parts = tuple(x.beside_mask(seen[x.name]) if x.name in seen else x.nothing for x in self._members)
        if not self._has_masks:
            return parts
        masks = {
            str(i): seen[x.name][ACTION_MASK] if x.name in self._acting else x.idle
            for i, x in enumerate(self._members)
            if x.mask_space is not None
        }
        return {"observation": parts, ACTION_MASK: masks}

    def _reward(self, reward: Mapping[str, Any]) -> float | None:
        """The sum of the members' rewards; None if there is none."""
        found = {member.name: reward[member.name] for member in self._members if member.name in reward}
        for name, x in found.items():
            if not isinstance(x, Real | np.ndarray | np.generic):
                raise EnvError(f"GroupAgents: step returned reward={short(x)} for agent {name!r}: expected one number.")
        return math.fsum(map(float, found.values())) if found else None

    def _numbers(self) -> dict[str, float] | None:
        """Of each number in the members' latest infos the mean over those that have it; None if there is none."""
        found: dict[str, list[float]] = {}
        for info in self._infos.values():
            for key, value in info.items():
                if isinstance(value, Real | np.bool_):
                    found.setdefault(key, []).append(float(value))
        return {key: math.fsum(values) / len(values) for key, values in found.items()} or None


class _Member:
    """A member of a group.

    Attributes:
        name: its id.
        space, mask_space: of what it sees beside its action mask, and of that; None if it has none.
        action_space: of its actions.
        nothing: what it shows if it sees nothing.
        idle: its mask if it does not act.
    """

    def __init__(self, name: str, env: MultiAgentEnv):
        self.name = name
        self.space, self.mask_space = split_mask(env.observation_space(name))
        self.action_space = env.action_space(name)
        self.nothing, self.idle = _nothing(self.space), None
        if self.mask_space is not None:
            ActionMasks(self.mask_space, self.action_space, distribution_for(self.action_space))  # or a SpaceError
            self.idle = _first_alone(self.action_space, self.mask_space)

    def beside_mask(self, obs: Any) -> Any:
        """What of an observation is no mask."""
        if self.mask_space is None:
            return obs
        rest = {key: part for key, part in obs.items() if key != ACTION_MASK}
        return rest["observation"] if list(rest) == ["observation"] else rest


def _nothing(space: gym.Space) -> Any:
    """Zeros, or what is nearest to them in a space."""
    if isinstance(space, spaces.Dict):
        return {key: _nothing(part) for key, part in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(map(_nothing, space.spaces))
    zeros = np.zeros(space.shape or (), space.dtype)
    if isinstance(space, spaces.Box):
        return zeros.clip(space.low, space.high)
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        last = np.asarray(space.start) + np.reshape(class_counts(space), space.shape or ()) - 1
        return np.asarray(zeros.clip(space.start, last), space.dtype)
    return zeros


def _first_alone(action_space: gym.Space, mask_space: gym.Space) -> Any:
    """A mask that allows the first value of each choice."""
    parts = children(action_space) or {}
    if isinstance(mask_space, spaces.Dict):
        return {key: _first_alone(parts[key], part) for key, part in mask_space.spaces.items()}
    if isinstance(mask_space, spaces.Tuple):
        return tuple(_first_alone(parts[str(i)], part) for i, part in enumerate(mask_space.spaces))
    mask = np.zeros(mask_space.shape or (), mask_space.dtype)
    mask[np.cumsum([0, *class_counts(action_space)[:-1]])] = 1
    return mask
