"""CartPole in other shapes: wrappers of CartPole-v1 that need memory, action masks or nested observations."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class HideVelocities(gym.ObservationWrapper):
    """The cart's position and the pole's angle alone: which way both move has to be remembered.

    RLlib calls the environment StatelessCartPole, SB3's zoo CartPoleNoVel.
    """

    def __init__(self, env: gym.Env):
        super().__init__(env)
        space = env.observation_space
        assert isinstance(space, spaces.Box)
        self.observation_space = spaces.Box(space.low[[0, 2]], space.high[[0, 2]], dtype=np.float32)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return observation[[0, 2]]


class NestObservation(gym.ObservationWrapper):
    """The same numbers in a Dict of Tuples, and which way the pole leans as a Discrete."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        number = spaces.Box(-np.inf, np.inf, (1,))
        part = spaces.Tuple([number, number])
        self.observation_space = spaces.Dict(cart=part, pole=spaces.Dict(angle=part, leans_right=spaces.Discrete(2)))

    def observation(self, observation: np.ndarray) -> dict[str, Any]:
        x, velocity, angle, angular_velocity = (observation[i : i + 1] for i in range(4))
        return {
            "cart": (x, velocity),
            "pole": {"angle": (angle, angular_velocity), "leans_right": int(angle[0] > 0)},
        }


class ActionSlots(gym.Wrapper):
    """The two pushes lie in two of many slots, others every step: `action_mask` shows which, `push` what they do.

    Observations are a Dict of `observation` [4], `push` [num_slots] (-1 left, 1 right, 0 in an empty slot) and
    `action_mask` [num_slots]. RLlib calls it ParametricActionsCartPole.

    Args:
        env: CartPole.
        num_slots: actions, of which two are legal.

    Raises:
        ValueError: by `step`, for an empty slot.
    """

    def __init__(self, env: gym.Env, num_slots: int = 10):
        super().__init__(env)
        self._num_slots = num_slots
        self.action_space = spaces.Discrete(num_slots)
        self.observation_space = spaces.Dict(
            observation=env.observation_space,
            push=spaces.Box(-1, 1, (num_slots,)),
            action_mask=spaces.MultiBinary(num_slots),
        )

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        obs, info = self.env.reset(seed=seed, options=options)
        return self._observe(obs), info

    def step(self, action: Any) -> tuple[dict, Any, bool, bool, dict]:
        if action not in self._slots:
            raise ValueError(f"slot {action} is empty")
        obs, reward, terminated, truncated, info = self.env.step(self._slots.index(action))
        return self._observe(obs), reward, terminated, truncated, info

    def _observe(self, obs: np.ndarray) -> dict[str, np.ndarray]:
        self._slots = self.env.unwrapped.np_random.choice(self._num_slots, 2, replace=False).tolist()
        push, mask = np.zeros(self._num_slots, np.float32), np.zeros(self._num_slots, np.int8)
        push[self._slots] = -1, 1
        mask[self._slots] = 1
        return {"observation": obs, "push": push, "action_mask": mask}
