"""Environments with known answers.

Env runners of their own process import this file alone: of Lightning and pytest it knows nothing.
"""

import contextlib
import ctypes
import os
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv


class OurFault(BaseException):
    """What an environment raises where lit_rl is at fault. No Exception: those of environments are survived."""


def check_action(space: gym.Space, action: Any) -> None:
    if not space.contains(action):
        raise OurFault(f"{action!r} is not in {space}")


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
    """One step: reward -(action - obs)^2. The best return is 0; an action outside of [-1, 1] is our fault."""

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self._value = self.np_random.uniform(-1, 1, 1).astype(np.float32)
        return self._value, {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        check_action(self.action_space, action)
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


class TurningEnv(gym.Env):
    """A pointer at a random angle, turned to either side by an action; the reward is its cosine, the limit 24 steps."""

    def __init__(self) -> None:
        self.observation_space, self.action_space = spaces.Box(-1, 1, (2,), np.float32), spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self._t, self._angle = 0, self.np_random.uniform(0, 2 * np.pi)
        return self._obs(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self._angle += 0.5 if action else -0.3
        self._t += 1
        return self._obs(), float(np.cos(self._angle)), False, self._t == 24, {}

    def _obs(self) -> np.ndarray:
        return np.array([np.cos(self._angle), np.sin(self._angle)], np.float32)


class CycleEnv(gym.Env):
    """Five steps and a truncation, always the same: the reward is 1 for the action t % 2."""

    def __init__(self) -> None:
        self.observation_space, self.action_space = spaces.Box(0, 1, (5,), np.float32), spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self._t = 0
        return np.eye(5, dtype=np.float32)[0], {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        reward = float(action == self._t % 2)
        self._t += 1
        return np.eye(5, dtype=np.float32)[self._t % 5], reward, False, self._t == 5, {}


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


class SampleEnv(gym.Env):
    """Random observations of any space, reward 1 for an action of the action space; any other is our fault.

    Episodes last 3, 4, 5, 3, ... steps and end by truncation and termination in turn.
    """

    def __init__(self, observation_space: gym.Space, action_space: gym.Space):
        self.observation_space, self.action_space = observation_space, action_space
        self._episode, self._t = -1, 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self._episode, self._t = self._episode + 1, 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        check_action(self.action_space, action)
        self._t += 1
        ended = self._t == 3 + self._episode % 3
        truncated = ended and self._episode % 2 == 1
        return self.observation_space.sample(), 1.0, ended and not truncated, truncated, {}


class MaskedEnv(gym.Env):
    """Random masks for any action space with discrete parts; an illegal action is our fault. Reward 1 for one of the
    two lowest values.

    Args:
        action_space: Discrete, MultiDiscrete, or a Dict or Tuple with such parts.
        nothing_at: a step of each episode at which the mask allows nothing.
    """

    def __init__(self, action_space: gym.Space, nothing_at: int | None = None):
        self.action_space = action_space
        mask_space = self._mask_space(action_space)
        self.observation_space = spaces.Dict(observation=spaces.Box(-1, 1, (2,)), action_mask=mask_space)
        self._nothing_at = nothing_at

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        self._t = 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[dict, float, bool, bool, dict]:
        check_action(self.action_space, action)
        self._check(self.action_space, action, self._mask)
        self._t += 1
        first, space = action, self.action_space
        while isinstance(space, spaces.Dict | spaces.Tuple):
            key = next(iter(space.spaces)) if isinstance(space, spaces.Dict) else 0
            first, space = first[key], space[key]
        low = np.ravel(first)[0] < np.ravel(space.start)[0] + 2
        return self._observe(), float(low), self._t == 9, False, {}

    def _mask_space(self, space: gym.Space) -> gym.Space | None:
        if isinstance(space, spaces.Discrete):
            return spaces.MultiBinary(int(space.n))
        if isinstance(space, spaces.MultiDiscrete):
            return spaces.Box(0, 1, (int(space.nvec.sum()),), np.int8)
        if isinstance(space, spaces.Dict):
            parts = {key: self._mask_space(part) for key, part in space.spaces.items()}
            return spaces.Dict({key: part for key, part in parts.items() if part is not None})
        if isinstance(space, spaces.Tuple):
            return spaces.Tuple([self._mask_space(part) for part in space.spaces])
        return None

    def _observe(self) -> dict[str, Any]:
        self._mask = self._draw(self.action_space)
        obs = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return {"observation": obs, "action_mask": self._mask}

    def _draw(self, space: gym.Space) -> Any:
        if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
            counts = [int(space.n)] if isinstance(space, spaces.Discrete) else space.nvec.tolist()
            parts = [(self.np_random.random(n) < 0.4).astype(np.int8) for n in counts]
            for part in parts:
                part[self.np_random.integers(len(part))] = 1
            return np.concatenate(parts) * np.int8(self._t != self._nothing_at)
        if isinstance(space, spaces.Dict):
            return {k: self._draw(part) for k, part in space.spaces.items() if self._mask_space(part) is not None}
        return tuple(self._draw(part) for part in space.spaces)

    def _check(self, space: gym.Space, action: Any, mask: Any) -> None:
        if isinstance(space, spaces.Discrete):
            legal = mask[action - space.start]
        elif isinstance(space, spaces.MultiDiscrete):
            at = np.cumsum([0, *space.nvec[:-1]]) + action - space.start
            legal = mask[at].all()
        elif isinstance(space, spaces.Dict):
            for key, part_mask in mask.items():
                self._check(space[key], action[key], part_mask)
            return
        else:
            for part, part_action, part_mask in zip(space.spaces, action, mask):
                self._check(part, part_action, part_mask)
            return
        if not legal:
            raise OurFault(f"{action} is illegal: {mask}")


class RepeatPreviousEnv(gym.Env):
    """Reward 1 for naming the previous observation (not at the first step): the best return is 8, a guess's 4."""

    def __init__(self) -> None:
        self.observation_space, self.action_space = spaces.Discrete(2), spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[int, dict]:
        super().reset(seed=seed)
        self._t, self._previous, self._value = 0, -1, int(self.np_random.integers(2))
        return self._value, {}

    def step(self, action: Any) -> tuple[int, float, bool, bool, dict]:
        reward = float(action == self._previous)
        self._t += 1
        self._previous, self._value = self._value, int(self.np_random.integers(2))
        return self._value, reward, self._t == 9, False, {}


class PictureEnv(gym.Env):
    """One step: reward 1 for naming the quarter of the picture that is white. A guess's return is 0.25."""

    def __init__(self, size: int = 12, channels_first: bool = False):
        shape = (3, size, size) if channels_first else (size, size, 3)
        self.observation_space = spaces.Box(0, 255, shape, np.uint8)
        self.action_space = spaces.Discrete(4)
        self._half, self._first = size // 2, channels_first

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self._quarter = int(self.np_random.integers(4))
        picture = np.zeros(self.observation_space.shape, np.uint8)
        top, left = (part * self._half for part in divmod(self._quarter, 2))
        at = (slice(top, top + self._half), slice(left, left + self._half))
        picture[(slice(None), *at) if self._first else at] = 255
        return picture, {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        return np.zeros(self.observation_space.shape, np.uint8), float(action == self._quarter), True, False, {}


class DawdlingEnv(gym.Wrapper):
    """CartPole, one copy of which takes long for every step: the first that an env runner's process makes.

    Args:
        lock: a file that this copy makes; None if there is none.
        seconds: of each of its steps.
    """

    def __init__(self, lock: str | None = None, seconds: float = 0.0):
        super().__init__(gym.make("CartPole-v1"))
        import ray

        self._seconds = 0.0
        in_runner = ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None
        if lock is not None and in_runner:
            with contextlib.suppress(FileExistsError), open(lock, "x"):
                self._seconds = seconds

    def step(self, action: Any) -> Any:
        time.sleep(self._seconds)
        return self.env.step(action)


class DyingEnv(CounterEnv):
    """Takes its process with it at its second step (the first is when the environment is tried out)."""

    steps = 0

    def step(self, action: int) -> tuple:
        self.steps += 1
        if self.steps == 2:
            os._exit(1)
        return super().step(action)


class StallingEnv(CounterEnv):
    """Never comes back from its third step, or from its second reset; "spin" holds the interpreter meanwhile."""

    def __init__(self, where: str):
        super().__init__()
        self._where, self._count = where, 0

    def reset(self, **kwargs: Any) -> tuple:
        if self._where == "reset" and self._episode == 0:
            time.sleep(3600)
        return super().reset(**kwargs)

    def step(self, action: int) -> tuple:
        self._count += 1
        if self._count == 3 and self._where == "step":
            time.sleep(3600)
        if self._count == 3 and self._where == "spin":
            ctypes.PyDLL(None).sleep(3600)  # a PyDLL does not let go of the interpreter
        return super().step(action)


class WideEnv(CounterEnv):
    """An observation of one MB."""

    def __init__(self) -> None:
        super().__init__()
        self.observation_space = spaces.Box(0, 1, (250_000,), np.float32)

    def _obs(self) -> np.ndarray:
        return np.zeros(250_000, np.float32)


class Paid(CounterEnv):
    """A CounterEnv whose rewards are 100."""

    def __init__(self, steps: int = 1, offset: int = 0):
        super().__init__(offset)
        self._steps = steps

    def step(self, action: Any) -> Any:
        obs, _, terminated, truncated, info = super().step(action)
        return obs, 100.0, terminated or self._t == self._steps, truncated, info


def halve(reward: float) -> float:
    return 0.5 * reward


class SlowElsewhere(CounterEnv):
    """Takes its time outside of the process `home`."""

    def __init__(self, home: int, step_s: float):
        super().__init__()
        self._step_s = 0.0 if os.getpid() == home else step_s

    def step(self, action: int) -> tuple:
        time.sleep(self._step_s)
        return super().step(action)


class SlowCycleEnv(CycleEnv):
    """Takes its time, in processes that ask for it."""

    def step(self, action: Any) -> tuple:
        time.sleep(float(os.environ.get("STEP_S", "0")))
        return super().step(action)


class StuckCycleEnv(CycleEnv):
    """Its eighth step, in the second batch, takes a minute; a file says that it has begun."""

    steps = 0

    def step(self, action: Any) -> tuple:
        self.steps += 1
        if self.steps == 8:
            Path(os.environ["RUN_OF_TEST"], "stuck").touch()
            time.sleep(60)
        return super().step(action)
