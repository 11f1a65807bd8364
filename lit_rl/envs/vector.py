"""Stepping environments one after the other with little in between."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import iterate


class SyncVectorEnv(gym.vector.SyncVectorEnv):
    """gymnasium's SyncVectorEnv with a shorter `step` in autoreset mode SAME_STEP, for observations that are arrays.

    Returns what gymnasium's returns, in fresh arrays. On eight CartPoles a step takes 130 us instead of 190:
    observations are written once instead of three times, and discrete actions are Python ints, which environments
    check faster.
    """

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        if self.autoreset_mode is not AutoresetMode.SAME_STEP or not isinstance(self._observations, np.ndarray):
            return super().step(actions)
        if isinstance(self.single_action_space, gym.spaces.Discrete):
            actions = np.asarray(actions).tolist()
        elif not isinstance(actions, np.ndarray):
            actions = list(iterate(self.action_space, actions))
        obs = np.empty_like(self._observations)
        rewards, terminations, truncations = [], [], []
        infos: dict[str, Any] = {}
        for i, (env, action) in enumerate(zip(self.envs, actions, strict=True)):
            env_obs, reward, terminated, truncated, info = env.step(action)
            if terminated or truncated:
                infos = self._add_info(infos, {"final_obs": env_obs, "final_info": info}, i)
                env_obs, info = env.reset()
            if info:
                infos = self._add_info(infos, info, i)
            obs[i] = env_obs
            rewards.append(reward)
            terminations.append(terminated)
            truncations.append(truncated)
        return (
            obs,
            np.array(rewards, np.float64),
            np.array(terminations, np.bool_),
            np.array(truncations, np.bool_),
            infos,
        )
