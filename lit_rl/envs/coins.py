"""A small game of two teams: an example of an environment of several agents, and what recipes train on."""

import functools
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from lit_rl.envs.multi_agent import MultiAgentEnv

FOX = "fox"
MOVES = np.array([(0, 0), (0, 1), (1, 0), (0, -1), (-1, 0)])
SEEN = 3  # coins that an agent sees, the nearest first
COLORS = {"red": (200, 60, 60), "blue": (60, 90, 200), FOX: (230, 150, 40), "coin": (240, 210, 60)}
PIXELS = 16  # of a square


class CoinGame(MultiAgentEnv):
    """Red and blue, two players each, pick up coins on a board, and so does a neutral fox, for nobody.

    All move at once, by at most one square. Who moves onto a coin has it, by lot if there are several, and another coin
    appears elsewhere. Both players of a team get 1 for a coin of either. The game lasts `num_steps`; the team with more
    coins has won. It ends by termination: players see how much time is left.

    Observations [17]: the nearest three coins and the other four agents, each as steps to go to the right and up, team
    mate before opponents before the fox; the own place; the time left. All but that are divided by the board's size.
    Actions: 0 stay, 1 up, 2 right, 3 down, 4 left.

    Args:
        size: squares of a side of the board.
        num_coins: on the board at a time, at least three.
        num_steps: of an episode.
        render_mode: "rgb_array" or None.
    """

    possible_agents = ("red_0", "red_1", "blue_0", "blue_1", FOX)

    def __init__(self, size: int = 8, num_coins: int = 4, num_steps: int = 60, render_mode: str | None = None):
        if num_coins < SEEN or size < 3:
            raise ValueError(f"size={size}, num_coins={num_coins}: expected at least 3 of each.")
        self.render_mode = render_mode
        self._size, self._num_coins, self._num_steps = size, num_coins, num_steps
        self._rng = np.random.default_rng()
        names = list(self.possible_agents)
        # [5, 4]: of each agent whom it sees, in the order of its observation.
        self._others = np.array(
            [
                [names.index(other) for other in sorted(set(names) - {name}, key=functools.partial(_how_close, name))]
                for name in names
            ]
        )

    def observation_space(self, agent: str) -> gym.Space:
        return spaces.Box(-1, 1, (2 * (SEEN + len(self.possible_agents)) + 1,))

    def action_space(self, agent: str) -> gym.Space:
        return spaces.Discrete(len(MOVES))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        if seed is not None:
            self._rng = np.random.default_rng(seed)
        num_agents = len(self.possible_agents)
        squares = self._rng.permutation(self._size**2)[: num_agents + self._num_coins]
        placed = np.stack(np.divmod(squares, self._size), 1)
        self._places, self._coins = placed[:num_agents], placed[num_agents:]
        self._t = 0
        return self._observe(), {}

    def step(self, actions: dict[str, Any]) -> tuple[dict, dict, dict, dict, dict]:
        self._t += 1
        moves = MOVES[[int(actions[agent]) for agent in self.possible_agents]]
        self._places = (self._places + moves).clip(0, self._size - 1)
        points = {"red": 0.0, "blue": 0.0}
        for c, coin in enumerate(self._coins):
            there = np.flatnonzero((self._places == coin).all(1))
            if len(there):
                team = _team(self.possible_agents[self._rng.choice(there)])
                if team in points:
                    points[team] += 1.0
                self._coins[c] = self._free_square()
        reward = {agent: points[_team(agent)] for agent in self.possible_agents if agent != FOX}
        over = dict.fromkeys(self.possible_agents, self._t == self._num_steps)
        return self._observe(), reward, over, {}, {}

    def render(self) -> np.ndarray:
        """The board from above, [H, W, 3] uint8."""
        picture = np.full((self._size * PIXELS, self._size * PIXELS, 3), 245, np.uint8)
        for coin in self._coins:
            _draw(picture, coin, COLORS["coin"], 5)
        for agent, place in zip(self.possible_agents, self._places):
            _draw(picture, place, COLORS[_team(agent)], 2)
        return np.ascontiguousarray(np.rot90(picture))

    def _observe(self) -> dict[str, np.ndarray]:
        places = self._places[:, None]  # [5, 1, 2]
        coins = self._coins - places
        nearest = np.abs(coins).sum(2).argsort(1, kind="stable")[:, :SEEN, None]
        parts = [np.take_along_axis(coins, nearest, 1), self._places[self._others] - places, places]
        seen = np.concatenate(parts, 1).reshape(len(places), -1) / self._size
        left = np.full((len(places), 1), 1 - self._t / self._num_steps)
        return dict(zip(self.possible_agents, np.concatenate([seen, left], 1, dtype=np.float32, casting="same_kind")))

    def _free_square(self) -> np.ndarray:
        """A square without agent or coin."""
        taken = np.concatenate([self._places, self._coins]) @ (self._size, 1)
        free = np.setdiff1d(np.arange(self._size**2), taken)
        return np.array(divmod(int(self._rng.choice(free)), self._size))


class Fox:
    """Goes to the nearest coin of a `CoinGame`: the fox as a scripted policy."""

    def act(self, obs: np.ndarray) -> int:
        right, up = obs[:2]
        if abs(right) >= abs(up):
            return 2 if right > 0 else 4
        return 1 if up > 0 else 3


def _team(agent: str) -> str:
    return agent.split("_")[0]


def _how_close(agent: str, other: str) -> tuple[int, str]:
    """Team mates first, the fox last."""
    return (0 if _team(agent) == _team(other) else 2 if other == FOX else 1), other


def _draw(picture: np.ndarray, place: np.ndarray, color: tuple[int, int, int], margin: int) -> None:
    x, y = place * PIXELS
    picture[x + margin : x + PIXELS - margin, y + margin : y + PIXELS - margin] = color
