"""PettingZoo's environments as `MultiAgentEnv`s. PettingZoo itself is imported by whoever made one."""

import sys
from typing import Any

import gymnasium as gym

from lit_rl.envs.multi_agent import MultiAgentEnv, metadata_of, state_space_of
from lit_rl.errors import EnvError


def adapted(env: Any) -> Any:
    """An environment of PettingZoo, parallel or AEC, as a `MultiAgentEnv`; anything else as it is."""
    pettingzoo = sys.modules.get("pettingzoo")
    if pettingzoo is None:
        return env
    if isinstance(env, pettingzoo.ParallelEnv):
        return AtOnce(env)
    return InTurns(env) if isinstance(env, pettingzoo.AECEnv) else env


class _Adapter(MultiAgentEnv):
    def __init__(self, env: Any):
        self.env = env
        self.metadata = metadata_of(env)
        self.render_mode = getattr(env, "render_mode", None)
        self.state_space = state_space_of(env)
        self.possible_agents = list(getattr(env, "possible_agents", ()))
        if not self.possible_agents:
            raise TypeError(
                f"a {type(env).__name__} without possible_agents: expected the ids of all that may be in it"
            )

    def observation_space(self, agent: str) -> gym.Space:
        return self.env.observation_space(agent)

    def action_space(self, agent: str) -> gym.Space:
        return self.env.action_space(agent)

    def state(self) -> Any:
        return self.env.state()

    def render(self) -> Any:
        return self.env.render()

    def close(self) -> None:
        self.env.close()


class AtOnce(_Adapter):
    """A parallel environment of PettingZoo.

    Args:
        env: a `pettingzoo.ParallelEnv`.
    """

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        obs, info = self.env.reset(seed=seed, options=options)
        return dict(obs), dict(info)

    def step(self, actions: dict[str, Any]) -> tuple[dict, dict, dict, dict, dict]:
        return self.env.step(actions)


class InTurns(_Adapter):
    """An AEC environment of PettingZoo: one agent acts at a time.

    The rewards of every step are given as they come, to whomever they are for. An agent that is dead when it is
    selected ends then.

    Args:
        env: a `pettingzoo.AECEnv`.
    """

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        self.env.reset(seed=seed, options=options)
        obs, _, _, _, info = self._until_one_acts({}, self.env.agents)
        return obs, info

    def step(self, actions: dict[str, Any]) -> tuple[dict, dict, dict, dict, dict]:
        ((agent, action),) = actions.items()
        env, before = self.env, list(self.env.agents)
        if agent != env.agent_selection:
            raise EnvError(f"{env} was to be acted on by {agent!r} and has agent_selection={env.agent_selection!r}.")
        env.step(action)
        return self._until_one_acts({a: float(r) for a, r in env.rewards.items()}, before)

    def _until_one_acts(self, reward: dict[str, float], before: Any) -> tuple[dict, dict, dict, dict, dict]:
        """Step the dead agents that are selected, which leave, until one is selected that acts or none is left."""
        env, obs, terminated, truncated, info = self.env, {}, {}, {}, {}
        while env.agents:
            agent = env.agent_selection
            if agent not in env.agents:
                raise EnvError(f"{env} asks for an action of {agent!r}, which is not among its agents {env.agents}.")
            obs[agent], info[agent] = env.observe(agent), env.infos.get(agent, {})
            if not (env.terminations[agent] or env.truncations[agent]):
                break
            terminated[agent], truncated[agent] = bool(env.terminations[agent]), bool(env.truncations[agent])
            env.step(None)
            for other, more in env.rewards.items():
                reward[other] = reward.get(other, 0.0) + float(more)
        gone = [agent for agent in before if agent not in env.agents and agent not in terminated]
        if gone:
            raise EnvError(f"{env} let the agent {gone[0]!r} go without terminating or truncating it.")
        return obs, reward, terminated, truncated, info
