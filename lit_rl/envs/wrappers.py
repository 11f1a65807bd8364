"""Wrappers that put into the observation what a policy needs beside it."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from lit_rl.errors import EnvError


class _AddToObservation(gym.Wrapper):
    """Observations become a Dict: what there was (as `observation`, if it was no Dict), and more keys."""

    def __init__(self, env: gym.Env, more: dict[str, gym.Space]):
        super().__init__(env)
        space = env.observation_space
        self._nested = isinstance(space, spaces.Dict)
        parts = dict(space.spaces) if isinstance(space, spaces.Dict) else {"observation": space}
        self.observation_space = spaces.Dict(parts | more)

    def _add(self, obs: Any, more: dict[str, Any]) -> dict[str, Any]:
        return (dict(obs) if self._nested else {"observation": obs}) | more


class ActionMaskFromInfo(_AddToObservation):
    """Moves the action mask from `info` into the observation, where policies find it.

    Args:
        env: gives `info[key]` at every reset and step, a number for each action, above 0 for a legal one.
        key: of the mask.

    Raises:
        EnvError: if the action space has no such mask, or `info` does not hold one.
    """

    def __init__(self, env: gym.Env, key: str = "action_mask"):
        if isinstance(env.action_space, spaces.Discrete):
            self._size = int(env.action_space.n)
        elif isinstance(env.action_space, spaces.MultiDiscrete):
            self._size = int(env.action_space.nvec.sum())
        else:
            raise EnvError(f"ActionMaskFromInfo: expected a Discrete or MultiDiscrete action, got {env.action_space}.")
        super().__init__(env, {"action_mask": spaces.MultiBinary(self._size)})
        self._key = key

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        obs, info = self.env.reset(seed=seed, options=options)
        return self._observe(obs, info), info

    def step(self, action: Any) -> tuple[dict, Any, bool, bool, dict]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        return self._observe(obs, info), reward, terminated, truncated, info

    def _observe(self, obs: Any, info: dict[str, Any]) -> dict[str, Any]:
        if self._key not in info:
            raise EnvError(f"ActionMaskFromInfo: info has no {self._key!r}, only {sorted(info)}. Set key=.")
        mask = np.asarray(info[self._key])
        if mask.shape != (self._size,):
            raise EnvError(f"ActionMaskFromInfo: info[{self._key!r}] has shape {mask.shape}, expected ({self._size},).")
        return self._add(obs, {"action_mask": (mask > 0).astype(np.int8)})


class PreviousActionReward(_AddToObservation):
    """Adds the previous action and reward to the observation, zeros at an episode's start: for networks with memory.

    The keys are `previous_action` (one-hot where actions are discrete, else flat) and `previous_reward`.
    """

    def __init__(self, env: gym.Env):
        flat = spaces.flatten_space(env.action_space)
        if not isinstance(flat, spaces.Box):
            raise EnvError(f"PreviousActionReward: the action space {env.action_space} cannot be made a vector.")
        action = spaces.Box(-np.inf, np.inf, flat.shape)
        super().__init__(env, {"previous_action": action, "previous_reward": spaces.Box(-np.inf, np.inf, (1,))})
        self._nothing = np.zeros(flat.shape, np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        obs, info = self.env.reset(seed=seed, options=options)
        return self._observe(obs, self._nothing, 0.0), info

    def step(self, action: Any) -> tuple[dict, Any, bool, bool, dict]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        previous = np.asarray(spaces.flatten(self.env.action_space, action))
        return self._observe(obs, previous, reward), reward, terminated, truncated, info

    def _observe(self, obs: Any, action: np.ndarray, reward: Any) -> dict[str, Any]:
        more = {
            "previous_action": np.asarray(action, np.float32),
            "previous_reward": np.asarray([reward], np.float32),
        }
        return self._add(obs, more)
