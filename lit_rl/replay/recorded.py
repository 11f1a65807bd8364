"""Recorded episodes in memory, as columns of rows: what files are read into, and what offline data is drawn from.

Shapes: N rows of all episodes together, E episodes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Recorded:
    """Rows of episodes, one episode after the other, each in the order of time.

    An episode is its steps and, if that is known, one closing row with the final observation alone: there action,
    reward and flags say nothing. Without a closing row, the last step of an episode that was not terminated has no next
    observation: it is no transition.

    Attributes:
        columns: arrays [N, *shape] by path: "observation[/path]", "action[/path]"; beside them "log_prob" [N] where
            it was recorded.
        reward: float32 [N].
        terminated: bool [N].
        truncated: bool [N].
        closing: bool [N], which rows are closing ones.
        begins: int64 [E], the first row of each episode, in rising order.
        agents: whose time line each episode is; None where there is one agent alone.
    """

    columns: Mapping[str, np.ndarray]
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    closing: np.ndarray
    begins: np.ndarray
    agents: Sequence[str] | None = None
