"""Environments with known answers."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv


class CounterEnv(gym.Env):
    """obs = 100 * episode + t, reward = t: every transition can be checked from its numbers.

    Episode k (from 0) lasts `2 + (k + offset) % 3` steps and ends by truncation if k is odd, by termination otherwise.
    """

    def __init__(self, offset: int = 0):
        self.observation_space = spaces.Box(-1.0, 1e6, (1,), np.float32)
        self.action_space = spaces.Discrete(2)
        self._offset, self._episode, self._t = offset, -1, 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self._episode, self._t = self._episode + 1, 0
        return self._obs(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self._t += 1
        ended = self._t == 2 + (self._episode + self._offset) % 3
        truncated = ended and self._episode % 2 == 1
        return self._obs(), float(self._t), ended and not truncated, truncated, {"score": 10.0 * self._episode}

    def _obs(self) -> np.ndarray:
        return np.array([100 * self._episode + self._t], np.float32)


def counter_vector(num_envs: int, mode: str) -> gym.vector.VectorEnv:
    """CounterEnvs as a vector environment of its own, in any autoreset mode."""
    makers = [lambda offset=i: CounterEnv(offset) for i in range(num_envs)]
    return SyncVectorEnv(makers, autoreset_mode=AutoresetMode(mode))


class IdentityEnv(gym.Env):
    """One step: reward 1 for naming the observation. The best return is 1, a random policy's 1 / n."""

    def __init__(self, n: int = 4):
        self.observation_space, self.action_space = spaces.Discrete(n), spaces.Discrete(n)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[int, dict]:
        super().reset(seed=seed)
        self._value = int(self.np_random.integers(self.action_space.n))
        return self._value, {}

    def step(self, action: Any) -> tuple[int, float, bool, bool, dict]:
        return self._value, float(action == self._value), True, False, {}


class TargetEnv(gym.Env):
    """One step: reward -(action - obs)^2. The best return is 0."""

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self._value = self.np_random.uniform(-1, 1, 1).astype(np.float32)
        return self._value, {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        assert self.action_space.contains(action), action
        return self._value, -float((action[0] - self._value[0]) ** 2), True, False, {}


class ClockEnv(gym.Env):
    """Reward 1 per step for ever, cut by a time limit of 5: the true value of every state is 1 / (1 - gamma)."""

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self._t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self._t += 1
        return np.zeros(1, np.float32), 1.0, False, self._t == 5, {}


class WrongEnv(CounterEnv):
    """Does not keep to gymnasium's interface, each time in another way."""

    def __init__(self, how: str):
        super().__init__()
        self._how = how
        if how == "no space":
            del self.observation_space

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> Any:
        obs, info = super().reset(seed=seed)
        return {"no info": obs, "obs shape": (np.zeros(3), info)}.get(self._how, (obs, info))

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = super().step(action)
        if self._how == "four":
            return obs, reward, terminated, info
        reward = {"reward list": [1.0], "reward none": None}.get(self._how, reward)
        terminated = {"flag array": np.array([False])}.get(self._how, terminated)
        return obs, reward, terminated, truncated, info


class FailingEnv(CounterEnv):
    """Raises, or gives a bad number, at its `at`-th step."""

    def __init__(self, how: str = "raise", at: int = 7):
        super().__init__()
        self._how, self._at, self._steps = how, at, 0

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        obs, reward, terminated, truncated, info = super().step(action)
        self._steps += 1
        if self._steps == self._at:
            if self._how == "raise":
                raise ValueError("the simulator fell over")
            if self._how == "nan reward":
                reward = float("nan")
            if self._how == "nan observation":
                obs = np.full_like(obs, np.nan)
        if self._how == "nan final observation" and truncated:
            obs = np.full_like(obs, np.nan)
        return obs, reward, terminated, truncated, info
