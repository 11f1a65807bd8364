"""Returns of several agents over seeded episodes, with intervals: what benchmarks of one environment share."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lit_rl import Policy, load_policy
from lit_rl.envs.make import EnvConfig
from lit_rl.evaluation.episodes import play
from lit_rl.policy import PolicySet
from lit_rl.spec import MultiAgentSpec
from lit_rl.viewing.playing import environment_of

NORMAL_95 = 1.96  # standard errors on either side of a mean


def returns_of(env: EnvConfig, policy: Any, seeds: Sequence[int]) -> np.ndarray:
    """The return of an episode for each seed, the sum over the agents, as `eval/return_mean` has it.

    Args:
        env: of several agents.
        policy: a policy, which acts greedily, or several; or what acts for every agent, such as `Random()`.
        seeds: one for each episode.
    """
    if not isinstance(policy, Policy | PolicySet):
        spec = env.try_out()
        assert isinstance(spec, MultiAgentSpec)
        policy = PolicySet(spec, {"script": policy}, "script").eval()
    policy.rng = np.random.default_rng(seeds)
    found = {episode.seed: episode.return_ for episode in play(env, policy, seeds)}
    return np.array([found[seed] for seed in seeds])


def checkpoint_returns(path: str, env: str, env_kwargs: Mapping[str, Any], seeds: Sequence[int]) -> np.ndarray:
    """`returns_of` a checkpoint's policy in an environment with the wrappers that it was trained with."""
    return returns_of(environment_of(path, env, dict(env_kwargs)), load_policy(path), seeds)


def mean_and_interval(returns: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """The mean, and how far its 95 % interval reaches on either side: 1.96 standard errors.

    >>> mean_and_interval([1.0, 3.0, 5.0, 7.0])[0]
    4.0
    """
    values = np.asarray(returns, np.float64)
    return float(values.mean()), float(NORMAL_95 * values.std(ddof=1) / np.sqrt(len(values)))


def line(name: str, returns: Sequence[float] | np.ndarray, num_agents: int) -> str:
    """What is printed of some returns."""
    mean, reach = mean_and_interval(returns)
    of_one = f"of an agent {mean / num_agents:.2f} +- {reach / num_agents:.2f}"
    return f"{name}: return {mean:.2f} +- {reach:.2f} ({of_one}), {len(returns)} episodes"


def env_steps_per_s(env: EnvConfig, seconds: float) -> float:
    """Steps/s of an environment alone, with random actions that are drawn beforehand."""
    made, steps, begun = env.make_multi_agent(), 0, time.perf_counter()
    drawn = {agent: [made.action_space(agent).sample() for _ in range(64)] for agent in made.possible_agents}
    while time.perf_counter() - begun < seconds:
        obs, _ = made.reset(seed=steps)
        while obs:
            obs, _, terminated, truncated, _ = made.step({agent: drawn[agent][steps % 64] for agent in obs})
            obs = {agent: x for agent, x in obs.items() if not (terminated.get(agent) or truncated.get(agent))}
            steps += 1
    made.close()
    return steps / (time.perf_counter() - begun)
