"""What an algorithm must know of an environment, in plain data, and what networks and policies ask of a space."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from lit_rl.errors import OptionError, SpaceError
from lit_rl.roster import Roster
from lit_rl.trees import children, space_leaves


@dataclass(frozen=True)
class EnvSpec:
    """The spaces of one (unvectorised) environment.

    Attributes:
        env_id: how messages and checkpoints name the environment.
        observation_space: of a single environment.
        action_space: of a single environment.
        central_space: of what a central critic sees beside an agent's own observation; None if there is no such critic.
    """

    env_id: str
    observation_space: gym.Space
    action_space: gym.Space
    central_space: gym.Space | None = None

    def to_dict(self) -> dict[str, Any]:
        """The spec as plain data: what a `weights_only` checkpoint and a JSON file can hold."""
        found = {
            "env_id": self.env_id,
            "observation_space": space_to_dict(self.observation_space),
            "action_space": space_to_dict(self.action_space),
        }
        return found | _optional("central_space", self.central_space)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "EnvSpec":
        obs, action = (space_from_dict(data[key]) for key in ("observation_space", "action_space"))
        return cls(data["env_id"], obs, action, _space_if_any(data, "central_space"))


@dataclass(frozen=True)
class MultiAgentSpec:
    """The agents of an environment, and the spaces of each.

    Attributes:
        env_id: how messages name the environment.
        agents: by entry of `possible_agents`, in its order.
        max_agents: agents whose ids match a pattern, at a time, at most; None if there is no pattern.
        state_space: of the environment's `state()`; None if it has none.
    """

    env_id: str
    agents: dict[str, EnvSpec]
    max_agents: int | None = None
    state_space: gym.Space | None = None

    @property
    def roster(self) -> Roster:
        """Where agents are put."""
        return Roster(list(self.agents), self.max_agents)

    @property
    def num_slots(self) -> int:
        """Agents at a time, at most."""
        return self.roster.num_slots

    def shared(self, names: Sequence[str] | None = None, policy_id: str | None = None) -> EnvSpec:
        """The spaces that agents have in common, for one policy of theirs.

        Args:
            names: of the agents; None for all of them.
            policy_id: how messages name the policy, if it has one.

        Raises:
            OptionError: if they are not equal, or there is no agent.
        """
        if names is not None and not names:
            raise OptionError(f"policies[{policy_id!r}]: policy_mapping gives it no agent. Leave it out, or map one.")
        (first, spec), *others = [(name, self.agents[name]) for name in names or self.agents]
        for name, other in others:
            for kind in ("observation_space", "action_space"):
                if getattr(other, kind) != getattr(spec, kind):
                    whose = "one policy" if policy_id is None else f"policies[{policy_id!r}]"
                    raise OptionError(
                        f"env={self.env_id}: the {kind} of agent {first!r} is {getattr(spec, kind)}, that of {name!r} "
                        f"{getattr(other, kind)}: {whose} needs equal spaces. Pad them with a wrapper, or give each a "
                        f"policy of its own: MultiAgent({{'{_word(first)}': PPO(), '{_word(name)}': PPO()}}, "
                        f"policy_mapping={{'{first}': '{_word(first)}', '{name}': '{_word(name)}'}})."
                    )
        return spec

    def to_dict(self) -> dict[str, Any]:
        """The spec as plain data."""
        agents = {name: spec.to_dict() for name, spec in self.agents.items()}
        found = {"env_id": self.env_id, "agents": agents, "max_agents": self.max_agents}
        return found | _optional("state_space", self.state_space)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "MultiAgentSpec":
        agents = {name: EnvSpec.from_dict(spec) for name, spec in data["agents"].items()}
        return cls(data["env_id"], agents, data["max_agents"], _space_if_any(data, "state_space"))


def single(spec: EnvSpec | MultiAgentSpec) -> EnvSpec:
    """The spaces of one agent, or those that all agents have.

    Raises:
        OptionError: if agents have different ones.
    """
    return spec.shared() if isinstance(spec, MultiAgentSpec) else spec


def _optional(name: str, space: gym.Space | None) -> dict[str, Any]:
    """A space in plain data under a name, if there is one."""
    return {} if space is None else {name: space_to_dict(space)}


def _space_if_any(data: dict[str, Any], name: str) -> gym.Space | None:
    return space_from_dict(data[name]) if name in data else None


def _word(name: str) -> str:
    """A policy's id for an agent, in an example."""
    return "".join(x if x.isalnum() else "_" for x in name)


def space_to_dict(space: gym.Space) -> dict[str, Any]:
    """Plain data from which `space_from_dict` makes an equal space.

    Raises:
        SpaceError: for a space that lit_rl does not handle.
    """
    parts = children(space)
    if parts is not None:
        return {"type": type(space).__name__, "spaces": {key: space_to_dict(part) for key, part in parts.items()}}
    if isinstance(space, spaces.Discrete):
        return {"type": "Discrete", "n": int(space.n), "start": int(space.start)}
    if isinstance(space, spaces.MultiDiscrete):
        return {
            "type": "MultiDiscrete",
            "nvec": space.nvec.tolist(),
            "start": space.start.tolist(),
            "dtype": np.dtype(space.dtype).name,
        }
    if isinstance(space, spaces.MultiBinary):
        return {"type": "MultiBinary", "shape": list(space.shape)}
    if isinstance(space, spaces.Box):
        return {
            "type": "Box",
            "low": _bound_to_plain(space.low),
            "high": _bound_to_plain(space.high),
            "shape": list(space.shape),
            "dtype": np.dtype(space.dtype).name,
        }
    raise SpaceError(
        f"Space {space} is not supported: lit_rl handles Box, Discrete, MultiDiscrete, MultiBinary, and Dict and Tuple "
        "of these. Wrap the environment to give it such a space."
    )


def space_from_dict(data: dict[str, Any]) -> gym.Space:
    """The space that `space_to_dict` described."""
    if data["type"] in ("Dict", "Tuple"):
        parts = {key: space_from_dict(part) for key, part in data["spaces"].items()}
        # An OrderedDict keeps its order, which is that of the networks' inputs; gymnasium sorts the keys of a dict.
        return spaces.Dict(OrderedDict(parts)) if data["type"] == "Dict" else spaces.Tuple(parts.values())
    if data["type"] == "Discrete":
        return spaces.Discrete(data["n"], start=data["start"])
    if data["type"] == "MultiDiscrete":
        return spaces.MultiDiscrete(data["nvec"], dtype=np.dtype(data["dtype"]).type, start=data["start"])
    if data["type"] == "MultiBinary":
        return spaces.MultiBinary(data["shape"][0] if len(data["shape"]) == 1 else data["shape"])
    if data["type"] == "Box":
        shape, dtype = tuple(data["shape"]), np.dtype(data["dtype"])
        low, high = (np.broadcast_to(np.asarray(data[k], dtype), shape) for k in ("low", "high"))
        return spaces.Box(low, high, shape, dtype.type)
    raise SpaceError(f"Unknown space type {data['type']!r}: the file was written by a newer lit_rl.")


def is_image(space: gym.Space) -> bool:
    """Whether a space looks like images: a Box of three dimensions, or of two dimensions and bytes."""
    if not isinstance(space, spaces.Box):
        return False
    return len(space.shape) == 3 or (len(space.shape) == 2 and space.dtype == np.uint8)


def has_images(space: gym.Space) -> bool:
    """Whether any part of a space looks like images."""
    return any(is_image(leaf) for leaf in space_leaves(space).values())


def class_counts(space: gym.Space) -> list[int]:
    """How many values each discrete part of a space has; empty for Box and MultiBinary."""
    if isinstance(space, spaces.Discrete):
        return [int(space.n)]
    if isinstance(space, spaces.MultiDiscrete):
        return space.nvec.flatten().tolist()
    return []


def scale(space: gym.Space) -> float:
    """What bytes of a space are divided by."""
    return max(float(space.high.max(initial=1)), 1.0) if isinstance(space, spaces.Box) else 1.0


def _bound_to_plain(bound: np.ndarray) -> Any:
    """One number where all are equal (an image's bounds are), nested lists otherwise."""
    first = bound.flat[0].item() if bound.size else 0
    return first if bool((bound == first).all()) else bound.tolist()
