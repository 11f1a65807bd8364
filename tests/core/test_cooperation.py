"""The small cooperative games: their payoffs, and what half of the state says of the return."""

import itertools
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from lit_rl.envs.cooperation import Halves, TwoStepGame
from lit_rl.envs.make import EnvConfig
from lit_rl.spec import MultiAgentSpec


def play_two_steps(first: tuple[int, int], second: tuple[int, int]) -> tuple[float, list[list[float]]]:
    """The episode's return, summed over the agents, and the states on the way."""
    env = TwoStepGame()
    obs, _ = env.reset(seed=0)
    states, total = [obs["agent_0"].tolist()], 0.0
    for t, actions in enumerate((first, second)):
        obs, reward, terminated, truncated, _ = env.step(dict(zip(env.possible_agents, actions)))
        assert reward["agent_0"] == reward["agent_1"] and set(terminated.values()) == {t == 1} and not truncated
        assert (obs["agent_0"] == obs["agent_1"]).all() and (obs["agent_0"] == env.state()).all()
        assert env.state_space.contains(env.state())
        states.append(obs["agent_0"].tolist())
        total += sum(reward.values())
    return total, states


@pytest.mark.parametrize("other", [0, 1])  # what agent_1 does in the first step has no effect
def test_the_two_step_game_pays_7_on_one_side_and_0_1_1_8_on_the_other(other: int) -> None:
    everything = list(itertools.product((0, 1), repeat=2))
    assert [play_two_steps((0, other), second)[0] for second in everything] == [7, 7, 7, 7]
    assert [play_two_steps((1, other), second)[0] for second in everything] == [0, 1, 1, 8]
    assert play_two_steps((0, other), (1, 1))[1][:2] == [[1, 0, 0], [0, 1, 0]]
    assert play_two_steps((1, other), (1, 1))[1][:2] == [[1, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize("name", ["TwoStepGame", "Halves"])
def test_the_games_are_what_environments_must_be(name: str) -> None:
    spec = EnvConfig(f"lit_rl.envs.cooperation:{name}").try_out()
    assert isinstance(spec, MultiAgentSpec) and list(spec.agents) == ["agent_0", "agent_1"]
    assert spec.shared().action_space == spaces.Discrete(2)


def test_each_agent_sees_one_number_and_both_get_their_product() -> None:
    env, seen = Halves(length=4), set()
    for seed in range(20):
        obs, _ = env.reset(seed=seed)
        numbers = [int(obs[agent][0]) for agent in env.possible_agents]
        seen.add(tuple(numbers))
        for t, named in enumerate([(-1, -1), (1, -1), (-1, 1), (1, 1)]):
            left = 1 - t / 4
            assert env.state().tolist() == [*numbers, left] and env.state_space.contains(env.state())
            assert [x.tolist() for x in obs.values()] == [[x, left] for x in numbers]
            obs, reward, terminated, _, _ = env.step({f"agent_{i}": (x + 1) // 2 for i, x in enumerate(named)})
            right = sum(x == n for x, n in zip(named, numbers))
            assert reward == dict.fromkeys(env.possible_agents, numbers[0] * numbers[1] + 0.05 * right)
            assert set(terminated.values()) == {t == 3}
    assert seen == {(-1, -1), (-1, 1), (1, -1), (1, 1)}


def test_episodes_of_halves_depend_on_the_seed_and_a_length_is_needed() -> None:
    env = Halves()
    draws = [[env.reset(seed=seed)[0]["agent_0"][0] for seed in range(30)] for _ in range(2)]
    assert draws[0] == draws[1] and len(set(draws[0])) == 2
    assert len({env.reset()[0]["agent_0"][0] for _ in range(30)}) == 2  # without a seed it goes on
    with pytest.raises(ValueError, match="length=0: expected at least 1"):
        Halves(length=0)


def explained(by: Any, returns: Any) -> float:
    """Which part of the variance of `returns` their means by a key explain: the most that a critic of the key can."""
    keys, groups = np.unique(by, axis=0, return_inverse=True)
    means = np.array([returns[groups.ravel() == g].mean() for g in range(len(keys))])
    return float(1 - (returns - means[groups.ravel()]).var() / returns.var())


def test_half_of_the_state_says_little_of_the_return_and_the_whole_nearly_all() -> None:
    env, rng, gamma = Halves(), np.random.default_rng(0), 0.99
    halves, wholes, returns = [], [], []
    for seed in range(1000):
        obs, _ = env.reset(seed=seed)
        rewards = []
        for _ in range(10):
            halves.append(obs["agent_0"])
            wholes.append(env.state())
            obs, reward, *_ = env.step({agent: int(rng.integers(2)) for agent in env.possible_agents})
            rewards.append(reward["agent_0"])
        weights = gamma ** np.arange(10)
        returns += [float(np.dot(rewards[t:], weights[: 10 - t])) for t in range(10)]
    assert explained(np.array(halves), np.array(returns)) < 0.1
    assert explained(np.array(wholes), np.array(returns)) > 0.99
