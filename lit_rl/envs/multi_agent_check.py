"""A few steps of a multi-agent environment before training: what it gets wrong is said in one sentence."""

import contextlib
from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np

from lit_rl.envs.check import check_spaces, legal_action, step_complaint
from lit_rl.envs.multi_agent import MultiAgentEnv, state_space_of
from lit_rl.errors import EnvError, SpaceError, env_error
from lit_rl.observations import short
from lit_rl.roster import Roster, is_pattern
from lit_rl.spec import EnvSpec, MultiAgentSpec, space_from_dict, space_to_dict

PARTS = ("observation", "reward", "terminated", "truncated", "info")
NUM_STEPS = 10


def spec_of(env: MultiAgentEnv, env_id: str) -> MultiAgentSpec:
    """An environment's agents and their spaces.

    Raises:
        EnvError, SpaceError: if there are none, or they are not what they should be.
    """
    names = list(env.possible_agents)
    if not names or not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
        raise EnvError(f"env={env_id}: possible_agents={short(names)}: expected strings, each of them once.")
    most = getattr(env, "max_agents", None)
    if any(map(is_pattern, names)) and not (isinstance(most, int) and most > 0):
        raise EnvError(
            f"env={env_id}: max_agents={most!r}: expected how many agents of {[x for x in names if is_pattern(x)]} "
            "there are at a time at most."
        )
    agents = {}
    for name in names:
        found = env.observation_space(name), env.action_space(name)
        for kind, space in zip(("observation_space", "action_space"), found):
            if not isinstance(space, gym.Space):
                raise EnvError(f"env={env_id}: {kind}({name!r})={short(space)}: expected a gymnasium.Space.")
        check_spaces(f"{env_id}, agent {name!r}", *found)
        agents[name] = EnvSpec(env_id, *found)
    state_space = state_space_of(env)
    with contextlib.suppress(SpaceError):  # of no use, unless a central critic asks for it
        return MultiAgentSpec(env_id, agents, most, state_space and space_from_dict(space_to_dict(state_space)))
    return MultiAgentSpec(env_id, agents, most)


def check_multi_agent_env(env: MultiAgentEnv, env_id: str) -> MultiAgentSpec:
    """Reset an environment, step it a few times with random actions, and hold what it returns against the protocol.

    Returns:
        Its agents and their spaces.

    Raises:
        EnvError: naming the environment, the agent, what it returned and what was expected.
    """
    spec = spec_of(env, env_id)
    roster = Roster(env.possible_agents, spec.max_agents)
    obs, _ = checked_reset(env_id, "reset", roster, _call(env_id, "reset", env.reset, seed=0))
    acting = _check_all(spec, roster, "reset", obs, {}, {}, {}, set())
    if not acting:
        raise EnvError(f"env={env_id}: reset gave no observation: expected those of the agents that act first.")
    alive = set(acting)
    for _ in range(NUM_STEPS):
        actions = {agent: legal_action(spec.agents[str(roster.name_of(agent))], obs[agent]) for agent in acting}
        result = checked_step(env_id, roster, _call(env_id, "step", env.step, actions))
        obs, reward, terminated, truncated, _ = result
        acting = _check_all(spec, roster, "step", obs, reward, terminated, truncated, alive)
        alive = {agent for agent in alive if not (terminated.get(agent) or truncated.get(agent))} | set(acting)
        if not alive:
            break
    for name, before in spec.agents.items():
        if (env.observation_space(name), env.action_space(name)) != (before.observation_space, before.action_space):
            raise EnvError(f"env={env_id}: the spaces of agent {name!r} changed: expected the same ones every time.")
    return spec


def checked_reset(env_id: str, what: str, roster: Roster, result: Any) -> tuple[dict, dict]:
    """What `reset` returned, if that is two dicts of agents."""
    if not (isinstance(result, tuple) and len(result) == 2 and all(isinstance(x, Mapping) for x in result)):
        raise EnvError(f"env={env_id}: {what} returned {short(result)}: expected (observation, info), dicts by agent.")
    _check_names(env_id, what, "an observation of", roster, result[0])
    return result


def checked_step(env_id: str, roster: Roster, result: Any) -> tuple[dict, dict, dict, dict, dict]:
    """What `step` returned, if that is five dicts of agents."""
    if not (isinstance(result, tuple) and len(result) == 5 and all(isinstance(x, Mapping) for x in result)):
        raise EnvError(
            f"env={env_id}: step returned {short(result)}: expected (observation, reward, terminated, truncated, "
            "info), dicts by agent."
        )
    for what, part in zip(("an observation of", "a reward for", "the end of", "the end of"), result):
        _check_names(env_id, "step", what, roster, part)
    return result


def missing_final(env_id: str, agent: str) -> EnvError:
    """The error of an agent that is truncated without a final observation."""
    return EnvError(
        f"env={env_id}: agent {agent!r} was truncated without an observation: expected its final one, whose value is "
        "bootstrapped."
    )


def _check_names(env_id: str, where: str, what: str, roster: Roster, agents: Mapping[str, Any]) -> None:
    for agent in agents:
        if not isinstance(agent, str) or roster.name_of(agent) is None:
            raise stranger(env_id, f"{where} returned {what}", roster, agent)


def stranger(env_id: str, what: str, roster: Roster, agent: Any) -> EnvError:
    """The error of an agent that must not be there."""
    hint = ". Leave '__all__' out" if agent == "__all__" else ""
    return EnvError(
        f"env={env_id}: {what} {agent!r}: expected an agent of possible_agents={short(list(roster.names))}{hint}."
    )


def _check_all(
    spec: MultiAgentSpec,
    roster: Roster,
    where: str,
    obs: Mapping[str, Any],
    reward: Mapping[str, Any],
    terminated: Mapping[str, Any],
    truncated: Mapping[str, Any],
    alive: set[str],
) -> list[str]:
    """Those that act next, after a close look at every agent's part."""
    for agent in {**obs, **reward, **terminated, **truncated}:
        space = spec.agents[str(roster.name_of(agent))].observation_space
        ended = terminated.get(agent, False), truncated.get(agent, False)
        seen = obs[agent] if agent in obs else _zeros(space)
        problem = step_complaint(space, (seen, reward.get(agent, 0.0), *ended, {}))
        if problem:
            raise EnvError(f"env={spec.env_id}: {where} returned for agent {agent!r} {problem}.")
        if ended[1] and not ended[0] and agent in alive and agent not in obs:
            raise missing_final(spec.env_id, agent)
    return [agent for agent in obs if not (terminated.get(agent) or truncated.get(agent))]


def _zeros(space: gym.Space) -> Any:
    """Something that is in a space, as far as anybody looks here."""
    if isinstance(space, gym.spaces.Dict):
        return {key: _zeros(part) for key, part in space.spaces.items()}
    if isinstance(space, gym.spaces.Tuple):
        return tuple(_zeros(part) for part in space.spaces)
    return np.zeros(space.shape or (), space.dtype)


def _call(env_id: str, where: str, function: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return function(*args, **kwargs)
    except Exception as error:
        raise env_error(env_id, f"raised in {where}", error) from error
