"""A small game that is seen as a picture."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from lit_rl.errors import OptionError

SQUARES = 16  # of a side of the board
PADDLE = 3  # squares that it is wide
TOP, BOTTOM = 1, SQUARES - 1  # rows in which a dot appears and lands
COLORS = {"dot": (240, 210, 60), "paddle": (60, 130, 220), "left": (110, 110, 110)}


class FallingDot(gym.Env):
    """A dot falls from the top of a picture, and a paddle at the bottom has to be below it when it lands.

    The board has 16 x 16 squares. A dot appears in a random column and falls by one square per step. The paddle is
    three squares wide, and moves by at most one square per step: it can catch every dot. A dot that lands on the paddle
    gets reward 1, another one -1, in the step whose observation shows it landed. In the next step another dot appears.
    A dot takes 15 steps, the last one 14. The episode terminates when the last dot has landed. `info["caught"]` is the
    share of dots that were caught, in the last step only. The top row shows how many dots are left after this one.

    It is bsuite's Catch (Osband et al. 2020, arXiv:1908.03568), larger, in colour, and with several dots.

    Observations [size, size, 3] uint8: the picture.
    Actions: 0 left, 1 stay, 2 right.

    Args:
        size: pixels of a side of the picture, a multiple of 16.
        num_dots: of an episode, at most 17.
        render_mode: "rgb_array" or None.

    Raises:
        OptionError: if there is no such size or number of dots.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}
    action_space = spaces.Discrete(3)

    def __init__(self, size: int = 64, num_dots: int = 5, render_mode: str | None = None):
        if not isinstance(size, int) or size < SQUARES or size % SQUARES:
            raise OptionError(f"size={size!r}: expected a multiple of {SQUARES}.")
        if not isinstance(num_dots, int) or not 1 <= num_dots <= SQUARES + 1:
            raise OptionError(f"num_dots={num_dots!r}: expected a whole number of 1 to {SQUARES + 1}.")
        self.observation_space = spaces.Box(0, 255, (size, size, 3), np.uint8)
        self.render_mode = render_mode
        self._pixels, self._num_dots = size // SQUARES, num_dots

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._paddle = int(self.np_random.integers(SQUARES - PADDLE + 1))
        self._left, self._caught = self._num_dots, 0
        self._drop()
        return self._observe(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self._paddle = min(max(self._paddle + int(action) - 1, 0), SQUARES - PADDLE)
        if self._row == BOTTOM:
            self._drop()
            return self._observe(), 0.0, False, False, {}
        self._row += 1
        if self._row < BOTTOM:
            return self._observe(), 0.0, False, False, {}
        caught = 0 <= self._column - self._paddle < PADDLE
        self._caught += caught
        over = self._left == 0
        info = {"caught": self._caught / self._num_dots} if over else {}
        return self._observe(), 1.0 if caught else -1.0, over, False, info

    def render(self) -> Any:
        """The picture, which is the observation too."""
        return self._observe()

    def _observe(self) -> np.ndarray:
        board = np.zeros((SQUARES, SQUARES, 3), np.uint8)
        board[0, : self._left] = COLORS["left"]
        board[BOTTOM, self._paddle : self._paddle + PADDLE] = COLORS["paddle"]
        board[self._row, self._column] = COLORS["dot"]
        return board.repeat(self._pixels, 0).repeat(self._pixels, 1)

    def _drop(self) -> None:
        self._row, self._column = TOP, int(self.np_random.integers(SQUARES))
        self._left -= 1
