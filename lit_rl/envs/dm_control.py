"""The DeepMind Control Suite's tasks as environments. Needs lit-rl[dm-control]."""

import importlib
import os
import sys
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from lit_rl.errors import OptionError, did_you_mean
from lit_rl.observations import short
from lit_rl.options import Count, check


class DMControl(gym.Env):
    """A task of `dm_control.suite` (Tassa et al. 2018, arXiv:1801.00690), such as cartpole swingup.

    Observations are float32 vectors: the task's observations in their own order, flattened. Actions are a Box. Rewards
    are of 0 to 1 for each of the task's steps. The episode is truncated at the task's time limit (1,000 of its steps),
    and terminates only where the task ends it (discount 0), which few do. The seed of `reset` reseeds the task.

    For pictures as observations, add `render_mode="rgb_array"`, `width=64`, `height=64` and the wrapper
    `gymnasium.wrappers:AddRenderObservation`.

    Args:
        domain: such as "cartpole".
        task: of that domain, such as "swingup".
        action_repeat: the task's steps per env step. Each takes the same action, and their rewards are added up.
        render_mode: "rgb_array" or None.
        width, height: pixels of the picture.
        camera_id: which of the task's cameras takes it.

    Raises:
        OptionError: if there is no such task, if `action_repeat` is below 1, or if dm_control is not installed.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"]}

    def __init__(
        self,
        domain: str = "cartpole",
        task: str = "swingup",
        action_repeat: int = 1,
        render_mode: str | None = None,
        width: int = 320,
        height: int = 240,
        camera_id: int = 0,
    ):
        action_repeat = check("action_repeat", action_repeat, Count)
        try:
            suite = _suite()
        except ImportError as error:
            raise OptionError(
                f"DMControl(domain={short(domain)}) needs dm_control ({error}): pip install lit-rl[dm-control]."
            ) from error
        if (domain, task) not in suite.ALL_TASKS:
            hint = did_you_mean(f"{domain} {task}", [" ".join(names) for names in suite.ALL_TASKS])
            raise OptionError(
                f"domain={short(domain)}, task={short(task)}: expected one of the {len(suite.ALL_TASKS)} tasks of "
                f"dm_control.suite.{hint}"
            )
        self._env = suite.load(domain, task)
        self._action_repeat, self._camera = action_repeat, (height, width, camera_id)
        self.render_mode = render_mode
        self.metadata = {**self.metadata, "render_fps": round(1 / (self._env.control_timestep() * action_repeat))}
        bounds = self._env.action_spec()
        self.action_space = spaces.Box(bounds.minimum.astype(np.float32), bounds.maximum.astype(np.float32))
        size = sum(int(np.prod(part.shape)) for part in self._env.observation_spec().values())
        self.observation_space = spaces.Box(-np.inf, np.inf, (size,))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self._env.task.random.seed(seed)
        return _flat(self._env.reset().observation), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        reward = 0.0
        for _ in range(self._action_repeat):
            now = self._env.step(action)
            reward += float(now.reward)
            if now.last():
                break
        terminated = now.last() and now.discount == 0
        return _flat(now.observation), reward, terminated, now.last() and not terminated, {}

    def render(self) -> Any:
        """What the camera sees, [height, width, 3] uint8."""
        height, width, camera_id = self._camera
        return self._env.physics.render(height, width, camera_id)

    def close(self) -> None:
        self._env.close()


def _suite() -> Any:
    """`dm_control.suite`. Its import chooses what draws: EGL without a display, unless MUJOCO_GL names another."""
    display = sys.platform != "linux" or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY")))
    if not display and "MUJOCO_GL" not in os.environ:
        os.environ["MUJOCO_GL"] = "egl"  # its own first choice, GLFW, is imported without a display, and fails later
        try:
            return importlib.import_module("dm_control.suite")
        except ImportError:
            del os.environ["MUJOCO_GL"]
    return importlib.import_module("dm_control.suite")


def _flat(observation: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([np.ravel(part) for part in observation.values()], dtype=np.float32, casting="same_kind")
