"""A task that cannot be solved without memory."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from lit_rl.options import CountOrZero, check

NUM_CUES = 2
CUE, CHOOSE = slice(NUM_CUES), NUM_CUES  # where in the observation they are shown


class DelayedCue(gym.Env):
    """One of two cues is shown at the start and asked for at the end, with nothing to be seen in between.

    The first observation shows the cue. The next `delay` observations are all 0. Then one says "choose": the action
    that equals the cue gets reward 1, the other one -1, and the episode terminates. Its final observation shows the cue
    once more. Actions before that change nothing and get 0. An episode has `delay + 2` steps. Without memory the return
    is 0 on average, with memory it can be 1.

    bsuite's memory_len (Osband et al. 2020, arXiv:1908.03568) is much the same task with the same rewards, but shows
    how much time is left, and not the cue once more.

    Observations [3]: the cue, one-hot; 1 if it is time to choose, else 0.
    Actions: 0 or 1, the cues.

    Args:
        delay: steps between the cue and the choice.

    Raises:
        OptionError: if `delay` is not a whole number of at least 0.
    """

    observation_space = spaces.Box(0, 1, (NUM_CUES + 1,))
    action_space = spaces.Discrete(NUM_CUES)

    def __init__(self, delay: int = 10):
        self._delay = check("delay", delay, CountOrZero)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._cue = int(self.np_random.integers(NUM_CUES))
        self._t = 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        chosen = self._t == self._delay + 1
        self._t += 1
        reward = (1.0 if action == self._cue else -1.0) if chosen else 0.0
        return self._observe(), reward, chosen, False, {}

    def _observe(self) -> np.ndarray:
        obs = np.zeros(NUM_CUES + 1, np.float32)
        if self._t in (0, self._delay + 2):
            obs[CUE][self._cue] = 1
        obs[CHOOSE] = self._t == self._delay + 1
        return obs
