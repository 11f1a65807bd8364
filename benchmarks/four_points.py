"""Four points in a plane that are to meet: an environment of several agents whose physics costs next to nothing.

It needs only gymnasium and numpy, so the interpreter of another library can have it too.
"""

import math
from typing import Any

import numpy as np
from gymnasium import spaces

PUSHES = ((0.0, 0.0), (1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0))


class FourPoints:
    """All agents act at once, in episodes of 100 steps that end by truncation.

    An action pushes a point along an axis, or not at all. A point sees its position, its velocity and where the middle
    of all points is from it. Everybody's reward is minus the mean distance to the middle.
    """

    possible_agents = ["north", "east", "south", "west"]
    length = 100

    def observation_space(self, agent: str) -> spaces.Box:
        return spaces.Box(-np.inf, np.inf, (6,), np.float32)

    def action_space(self, agent: str) -> spaces.Discrete:
        return spaces.Discrete(len(PUSHES))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        places = np.random.default_rng(seed).uniform(-1, 1, (4, 2)).tolist()
        self._points = {agent: (x, y, 0.0, 0.0) for agent, (x, y) in zip(self.possible_agents, places)}
        self._steps = 0
        return self._see()[0], {}

    def step(self, actions: dict[str, Any]) -> tuple[dict, dict, dict, dict, dict]:
        for agent, action in actions.items():
            x, y, speed_x, speed_y = self._points[agent]
            push_x, push_y = PUSHES[action]
            speed_x, speed_y = 0.9 * speed_x + 0.01 * push_x, 0.9 * speed_y + 0.01 * push_y
            self._points[agent] = x + speed_x, y + speed_y, speed_x, speed_y
        self._steps += 1
        obs, distance = self._see()
        over = dict.fromkeys(obs, self._steps == self.length)
        return obs, dict.fromkeys(obs, -distance), dict.fromkeys(obs, False), over, {}

    def close(self) -> None:
        return

    def _see(self) -> tuple[dict[str, np.ndarray], float]:
        """The observations, and the mean distance to the middle."""
        points = self._points.values()
        middle_x, middle_y = sum(point[0] for point in points) / 4, sum(point[1] for point in points) / 4
        distance = sum(math.hypot(x - middle_x, y - middle_y) for x, y, _, _ in points) / 4
        return {
            agent: np.array((*point, middle_x - point[0], middle_y - point[1]), np.float32)
            for agent, point in self._points.items()
        }, distance
