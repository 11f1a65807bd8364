"""Recorded episodes as a replay buffer that is full from the beginning."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_rl.errors import CheckpointError
from lit_rl.recorded import Recorded
from lit_rl.replay.buffer import DONE, IS_INIT, TERMINATED, TRANSITION, ReplayBuffer
from lit_rl.spec import EnvSpec


class RecordedBuffer(ReplayBuffer):
    """Rows of recorded episodes, of which some are drawn: what is done with them is `ReplayBuffer`'s.

    A row of the buffer is a row of `recorded`, whose arrays it has and does not copy. Nothing is added to it.

    Args:
        recorded: the episodes.
        spec: of the environment.
        rows: numbers of the transitions that are drawn; None: all of them. Others may come after these, as next
            observations, later rewards or steps of a sequence.
        state, priority_alpha, seed: see `ReplayBuffer`. Every row has the first state, since none was recorded.
        gamma: minibatches also have `return_to_go`, the discounted sum of the reward of a row and all later ones of its
            episode; `to_go_discount`, that of what comes after them, 0 where the episode was terminated; and
            `to_go_observation`, the last of the episode. All are [M], and in sequences [S, L], but for the last, [S].
            So the bootstrapped return is `return_to_go + to_go_discount * V(to_go_observation)`. None: they have none.
        has_is_init: minibatches of transitions say which ones begin an episode.
    """

    def __init__(
        self,
        recorded: Recorded,
        spec: EnvSpec,
        *,
        rows: np.ndarray | None = None,
        state: Mapping[str, np.ndarray] | None = None,
        priority_alpha: float | None = None,
        seed: np.random.SeedSequence | None = None,
        gamma: float | None = None,
        has_is_init: bool = False,
    ):
        num = len(recorded.reward)
        super().__init__(spec, num, state=state, priority_alpha=priority_alpha, seed=seed)
        for path in self._columns:
            if not path.startswith("state"):
                self._columns[path] = recorded.columns[path]
                self._tensors[path] = torch.from_numpy(recorded.columns[path])
        is_transition = recorded.is_transition
        self._rows = np.flatnonzero(is_transition) if rows is None else rows
        self._reward = recorded.reward
        self._flags[:] = is_transition * TRANSITION + (recorded.terminated & is_transition) * TERMINATED
        self._flags[recorded.begins] |= IS_INIT
        self._next[:] = np.arange(1, num + 1)
        # Where an episode ends without a closing row there is no next observation: what stands for it has no weight.
        ends = recorded.ends
        self._next[ends - 1] = ends - 1
        self._flags[ends - 1 - recorded.has_closing] |= DONE
        if self._previous is not None:
            self._previous[:] = np.arange(-1, num - 1)
            self._previous[recorded.begins] = -1
        self._written, self._num_transitions = num, len(self._rows)
        if self._tree is not None:
            self._tree.set(self._rows, self._max_priority**self._alpha)
        self._to_go = None if gamma is None else recorded.to_go(gamma)
        self._has_is_init = has_is_init

    @property
    def rows(self) -> np.ndarray:
        """Numbers of the transitions that are drawn."""
        return self._rows

    def _draw(self, num: int, beta: float) -> tuple[np.ndarray, np.ndarray | None]:
        if self._tree is not None or not self._num_transitions:
            return super()._draw(num, beta)
        return self._rows[self.rng.integers(len(self._rows), size=num)], None

    def _extras(self, index: np.ndarray, rows: np.ndarray) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        if self._to_go is not None:
            total, discount, last = self._to_go
            found |= {"return_to_go": torch.from_numpy(total[rows]), "to_go_discount": torch.from_numpy(discount[rows])}
            at = torch.from_numpy(last[index])  # a sequence is of one episode
            found |= {f"to_go_{path}": self._tensors[path].index_select(0, at) for path in self._obs_paths}
        if self._has_is_init and rows.ndim == 1:
            found["is_init"] = torch.from_numpy(self._flags[rows] & IS_INIT != 0)
        return found

    # --- checkpoints --------------------------------------------------------------------------------------------

    def position(self, *, whole: bool = True) -> dict[str, Any]:
        """What is to be drawn next, in plain data, without the rows.

        Args:
            whole: with priorities, which are as many as there are rows that are drawn.
        """
        found: dict[str, Any] = {"rng": self.rng.bit_generator.state, "transitions": len(self)}
        if self._tree is not None and whole:
            found |= {"max_priority": self._max_priority, "alpha": self._alpha}
            found["priorities"] = torch.from_numpy(self._tree.leaves[self._rows])
        return found

    def go_on(self, position: Mapping[str, Any]) -> None:
        """Draw what was to be drawn next when `position` was asked.

        Raises:
            CheckpointError: if there were other rows.
        """
        if position["transitions"] != len(self):
            raise CheckpointError(
                f"The checkpoint's run drew from {position['transitions']} recorded transitions, here there are "
                f"{len(self)}. Resume with the same data, or begin a new run with init_from."
            )
        self.rng.bit_generator.state = position["rng"]
        if self._tree is not None and position.get("alpha"):
            self._max_priority = position["max_priority"]
            self._tree.set(self._rows, position["priorities"].numpy() ** (self._alpha / position["alpha"]))
