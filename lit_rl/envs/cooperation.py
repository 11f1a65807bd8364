"""Two small games in which agents must know what the other knows: examples for critics that see more than one agent."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from lit_rl.envs.multi_agent import MultiAgentEnv

BONUS = 0.05  # of `Halves`: for each agent that names its number


class _Pair(MultiAgentEnv):
    """Two agents that act at once, by one of two actions each, and get the same reward."""

    possible_agents = ("agent_0", "agent_1")
    state_space: gym.Space

    def action_space(self, agent: str) -> gym.Space:
        return spaces.Discrete(2)

    def _of_both(self, value: Any) -> dict[str, Any]:
        return dict.fromkeys(self.possible_agents, value)


class TwoStepGame(_Pair):
    """The two-step game of Rashid et al. 2018, arXiv:1803.11485, section 5.

    In the first step, state 1, the action of agent_0 chooses: 0 leads to state 2A, 1 to state 2B. In the second both
    choose, and the payoff is 7 in state 2A whatever they do, and in state 2B

        [[0, 1],
         [1, 8]]

    by row for agent_0 and column for agent_1. Each agent gets half of it, so that an episode's return, the sum over the
    agents, is the payoff: at best 8. Whoever fears that the other may err prefers 7.

    Observations, and `state()`: which of the three states it is, one-hot.
    """

    state_space = spaces.Box(0, 1, (3,))

    def observation_space(self, agent: str) -> gym.Space:
        return self.state_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        self._at = 0
        return self._of_both(self.state()), {}

    def step(self, actions: dict[str, Any]) -> tuple[dict, dict, dict, dict, dict]:
        first, second = (int(actions[agent]) for agent in self.possible_agents)
        payoff = 0.0
        is_over = self._at > 0
        if self._at == 0:
            self._at = 1 + first
        elif self._at == 1:
            payoff = 7.0
        else:
            payoff = ((0.0, 1.0), (1.0, 8.0))[first][second]
        return self._of_both(self.state()), self._of_both(payoff / 2), self._of_both(is_over), {}, {}

    def state(self) -> np.ndarray:
        """Which state it is, one-hot [3]."""
        return np.eye(3, dtype=np.float32)[self._at]


class Halves(_Pair):
    """Each agent sees one of two numbers, and the reward depends on the product of both.

    In each episode both numbers are drawn from -1 and 1. In each of its `length` steps both agents get the product of
    the numbers, and 0.05 for each agent that names its own number: by action 1 for 1, by action 0 for -1. The return is
    nearly +-`length`, and neither number alone says anything about which.

    It ends by termination. Observations: the own number, and the time left from 1 to 0. `state()`: both numbers and the
    time left.

    Args:
        length: env steps of an episode.
    """

    state_space = spaces.Box(-1, 1, (3,))

    def __init__(self, length: int = 10):
        if length < 1:
            raise ValueError(f"length={length}: expected at least 1.")
        self._length = length
        self._rng = np.random.default_rng()

    def observation_space(self, agent: str) -> gym.Space:
        return spaces.Box(-1, 1, (2,))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        if seed is not None:
            self._rng = np.random.default_rng(seed)
        self._numbers = 2 * self._rng.integers(2, size=2) - 1
        self._t = 0
        return self._observe(), {}

    def step(self, actions: dict[str, Any]) -> tuple[dict, dict, dict, dict, dict]:
        self._t += 1
        named = [2 * int(actions[agent]) - 1 for agent in self.possible_agents]
        reward = float(self._numbers.prod()) + BONUS * int((self._numbers == named).sum())
        return self._observe(), self._of_both(reward), self._of_both(self._t == self._length), {}, {}

    def state(self) -> np.ndarray:
        """Both numbers and the time left, [3]."""
        return np.array([*self._numbers, 1 - self._t / self._length], np.float32)

    def _observe(self) -> dict[str, np.ndarray]:
        *numbers, left = self.state()
        return {agent: np.array([x, left], np.float32) for agent, x in zip(self.possible_agents, numbers)}
