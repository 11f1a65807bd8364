"""Environments of several agents: what they are, and wrappers of them."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from lit_rl.envs.entry_points import Wrapper, check_arguments, wrapper_of
from lit_rl.errors import EnvError
from lit_rl.masks import ACTION_MASK
from lit_rl.roster import Roster


@runtime_checkable
class MultiAgentEnv(Protocol):
    """An environment of several agents, which may act at once or in turns, come and go. Subclass it, or do as it says.

    Whoever has an observation, and is neither terminated nor truncated, acts next; an agent without one waits. The
    entry of an agent that ends is its final observation, which may be left out only if it is terminated. An agent that
    has an observation after it ended begins anew. The episode ends when no agent is left.

    Rewards may be given to anybody at any time: they are credited to the agent's last action.

    Ids that are not known beforehand are written with wildcards, as in "car_*". An attribute `max_agents` then says how
    many of all such agents there are at a time, at most. `metadata`, `render_mode` and `render()` may be there as
    gymnasium's are: an environment that has them can be seen. So may `state_space`, a space, and `state()`, which gives
    what is to be known of the whole: central critics can see it. After an episode's last step it is that of its end.

    Attributes:
        possible_agents: the ids, strings.
    """

    possible_agents: Sequence[str]

    def observation_space(self, agent: str) -> gym.Space:
        """The space of an agent's observations, always the same; `agent` is an entry of `possible_agents`."""
        raise NotImplementedError

    def action_space(self, agent: str) -> gym.Space:
        """The space of an agent's actions, always the same; `agent` is an entry of `possible_agents`."""
        raise NotImplementedError

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begin an episode: the observations of those that act first, and an info of anybody, both by agent."""
        raise NotImplementedError

    def step(
        self, actions: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, float], dict[str, bool], dict[str, bool], dict[str, Any]]:
        """Take the actions of all agents that were to act: observation, reward, terminated, truncated, info, by agent.

        Each may have any subset of the agents.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Let go of what it holds."""
        return


class MultiAgentWrapper(MultiAgentEnv):
    """Passes everything on to the environment inside.

    Override `observation_space` and `observe` to change what agents see.

    Args:
        env: the environment inside.
    """

    def __init__(self, env: MultiAgentEnv):
        self.env = env
        self.possible_agents = env.possible_agents
        self.max_agents: int | None = getattr(env, "max_agents", None)
        self.metadata = metadata_of(env)
        self.render_mode = getattr(env, "render_mode", None)
        self.state_space = state_space_of(env)

    def observe(self, agent: str, obs: Any, info: Any) -> Any:
        """What an agent sees instead of `obs`; `info` is its own of the same step."""
        return obs

    def observation_space(self, agent: str) -> gym.Space:
        return self.env.observation_space(agent)

    def action_space(self, agent: str) -> gym.Space:
        return self.env.action_space(agent)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        obs, info = self.env.reset(seed=seed, options=options)
        return self._observe_all(obs, info), info

    def step(self, actions: dict[str, Any]) -> tuple[dict, dict, dict, dict, dict]:
        obs, reward, terminated, truncated, info = self.env.step(actions)
        return self._observe_all(obs, info), reward, terminated, truncated, info

    def state(self) -> Any:
        return self.env.state()  # type: ignore[attr-defined]

    def render(self) -> Any:
        return self.env.render()  # type: ignore[attr-defined]

    def close(self) -> None:
        self.env.close()

    def _observe_all(self, obs: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
        return {agent: self.observe(agent, x, info.get(agent, {})) for agent, x in obs.items()}


class AgentId(MultiAgentWrapper):
    """Appends to each observation which agent sees it, one-hot: so that agents with one policy can differ.

    A vector becomes a longer one; anything else a Dict with the key `agent_id` and, if it was no Dict, `observation`.
    Agents of a pattern share a number.
    """

    def __init__(self, env: MultiAgentEnv):
        super().__init__(env)
        self._roster = Roster(self.possible_agents, self.max_agents)
        self._one_hot = dict(zip(self.possible_agents, np.eye(len(self.possible_agents), dtype=np.float32)))

    def observation_space(self, agent: str) -> gym.Space:
        space = self.env.observation_space(agent)
        number = spaces.Box(0, 1, (len(self._one_hot),))
        if isinstance(space, spaces.Box) and len(space.shape) == 1:
            low, high = (np.concatenate([a, b]).astype(np.float32) for a, b in zip(_bounds(space), _bounds(number)))
            return spaces.Box(low, high)
        return _with(space, {"agent_id": number})

    def observe(self, agent: str, obs: Any, info: Any) -> Any:
        name = self._roster.name_of(agent)
        if name is None:
            return obs  # an agent that must not be: the check after this says so
        if isinstance(obs, np.ndarray) and obs.ndim == 1:
            return np.concatenate([obs, self._one_hot[name]], dtype=np.float32, casting="unsafe")
        return _joined(obs, {"agent_id": self._one_hot[name]})


class ActionMasksFromInfo(MultiAgentWrapper):
    """Moves `info[agent]["action_mask"]` into the observations, where policies find it; without one all is legal."""

    def observation_space(self, agent: str) -> gym.Space:
        space, size = self.env.observation_space(agent), self._size(agent)
        return _with(space, {ACTION_MASK: spaces.MultiBinary(size)}) if size else space

    def observe(self, agent: str, obs: Any, info: Any) -> Any:
        size = self._size(agent)
        if not size:
            return obs
        mask = np.asarray(info[ACTION_MASK]) if ACTION_MASK in info else np.ones(size)
        if mask.shape != (size,):
            raise EnvError(f"info[{agent!r}]['action_mask'] has shape {mask.shape}: expected ({size},).")
        return _joined(obs, {ACTION_MASK: (mask > 0).astype(np.int8)})

    def _size(self, agent: str) -> int:
        space = self.env.action_space(agent)
        if isinstance(space, spaces.Discrete):
            return int(space.n)
        return int(space.nvec.sum()) if isinstance(space, spaces.MultiDiscrete) else 0


class ReplicatedEnv(MultiAgentEnv):
    """Copies of a gymnasium environment as the agents "agent_0", "agent_1", ... of one.

    An agent leaves when its own episode ends; the last one ends the whole. With `render_mode="rgb_array"` a picture is
    those of all side by side.

    Args:
        env: a gymnasium id, or a callable that makes an environment.
        num_agents: how many.
        wrappers: of each environment, applied in order, as the datamodules take them.
        **env_kwargs: of each environment.
    """

    def __init__(self, env: Any, num_agents: int = 2, wrappers: Sequence[Wrapper] = (), **env_kwargs: Any):
        make = env if callable(env) else lambda **kwargs: gym.make(env, **kwargs)
        self._envs: dict[str, gym.Env] = {f"agent_{i}": make(**env_kwargs) for i in range(num_agents)}
        for wrapper, kwargs in map(wrapper_of, wrappers):
            check_arguments(wrapper, kwargs)
            self._envs = {agent: wrapper(made, **kwargs) for agent, made in self._envs.items()}
        self.possible_agents = list(self._envs)
        first = next(iter(self._envs.values()), None)
        self.render_mode = getattr(first, "render_mode", None)
        # Pictures can be put side by side; windows cannot, all of them would draw into one.
        modes = [mode for mode in metadata_of(first).get("render_modes", ()) if mode == "rgb_array"]
        self.metadata = {**metadata_of(first), "render_modes": modes}

    def observation_space(self, agent: str) -> gym.Space:
        return self._envs[agent].observation_space

    def action_space(self, agent: str) -> gym.Space:
        return self._envs[agent].action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        seeds: Any = [None] * len(self._envs) if seed is None else range(seed, seed + len(self._envs))
        found = {a: env.reset(seed=n, options=options) for (a, env), n in zip(self._envs.items(), seeds)}
        return {agent: obs for agent, (obs, _) in found.items()}, {agent: info for agent, (_, info) in found.items()}

    def step(self, actions: dict[str, Any]) -> tuple[dict, dict, dict, dict, dict]:
        obs, reward, terminated, truncated, info = {}, {}, {}, {}, {}
        for agent, action in actions.items():
            obs[agent], reward[agent], terminated[agent], truncated[agent], info[agent] = self._envs[agent].step(action)
        return obs, reward, terminated, truncated, info

    def render(self) -> np.ndarray | None:
        frames: list[Any] = [env.render() for env in self._envs.values()]
        return None if frames[0] is None else np.concatenate(frames, axis=1)

    def close(self) -> None:
        for env in self._envs.values():
            env.close()


def has_agents(env: Any) -> bool:
    """Whether an environment is one of several agents, PettingZoo's included."""
    return isinstance(env, MultiAgentEnv) and not isinstance(env, gym.Env | gym.vector.VectorEnv)


def metadata_of(env: Any) -> dict[str, Any]:
    """What an environment says of itself; empty if it says nothing."""
    return getattr(env, "metadata", None) or {}


def state_space_of(env: Any) -> gym.Space | None:
    """The space of an environment's `state()`; None if it has none."""
    space = getattr(env, "state_space", None)
    return space if isinstance(space, gym.Space) and callable(getattr(env, "state", None)) else None


def has_masks_in_info(env: MultiAgentEnv) -> bool:
    """Whether action masks come in the info of an environment, and not in its observations; resets it."""
    parts = [env.observation_space(agent) for agent in env.possible_agents]
    choices = [env.action_space(agent) for agent in env.possible_agents]
    if any(isinstance(part, spaces.Dict) and ACTION_MASK in part.spaces for part in parts) or not any(
        isinstance(space, spaces.Discrete | spaces.MultiDiscrete) for space in choices
    ):
        return False
    result = env.reset()
    infos = result[1] if isinstance(result, tuple) and len(result) == 2 else None
    return isinstance(infos, dict) and any(ACTION_MASK in x for x in infos.values() if isinstance(x, dict))


def _bounds(space: spaces.Box) -> tuple[np.ndarray, np.ndarray]:
    return space.low, space.high


def _with(space: gym.Space, more: dict[str, gym.Space]) -> spaces.Dict:
    return spaces.Dict((dict(space.spaces) if isinstance(space, spaces.Dict) else {"observation": space}) | more)


def _joined(obs: Any, more: dict[str, Any]) -> dict[str, Any]:
    return (dict(obs) if isinstance(obs, dict) else {"observation": obs}) | more
