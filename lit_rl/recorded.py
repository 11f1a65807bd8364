"""Recorded episodes in memory, as columns of rows: what files are read into, and what offline data is drawn from.

Shapes: N rows of all episodes together, E episodes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lit_rl.returns import discounted_sum


@dataclass(frozen=True)
class Recorded:
    """Rows of episodes, one episode after the other, each in the order of time.

    An episode is its steps and, if that is known, one closing row with the final observation alone: there action,
    reward and flags say nothing. Without a closing row, the last step of an episode that was not terminated has no next
    observation: it is no transition.

    Attributes:
        columns: arrays [N, *shape] by path: "observation[/path]", "action[/path]"; beside them, where they were
            recorded, "log_prob" [N] and "deterministic" [N], whether the most probable action was taken.
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

    @property
    def ends(self) -> np.ndarray:
        """The row after each episode's last one, [E]."""
        return np.append(self.begins[1:], len(self.reward))

    @property
    def has_closing(self) -> np.ndarray:
        """Whether each episode has a closing row, [E]."""
        return self.closing[self.ends - 1]

    @property
    def lengths(self) -> np.ndarray:
        """Steps of each episode, [E]."""
        return self.ends - self.begins - self.has_closing

    @property
    def returns(self) -> np.ndarray:
        """The sum of each episode's rewards, float64 [E]."""
        return np.add.reduceat(np.where(self.closing, 0.0, self.reward), self.begins)

    @property
    def is_dropped(self) -> np.ndarray:
        """Whether each episode's last step is no transition, since what came after it is not known, [E]."""
        return ~self.has_closing & ~self.terminated[self.ends - 1]

    @property
    def is_transition(self) -> np.ndarray:
        """Which rows are transitions, [N]."""
        found = ~self.closing
        found[self.ends[self.is_dropped] - 1] = False
        return found

    @property
    def summary(self) -> str:
        """How much it is, in words."""
        returns, dropped = self.returns, int(self.is_dropped.sum())
        said = f"{len(returns)} episodes, {int(self.is_transition.sum())} transitions, mean return {returns.mean():.6g}"
        if dropped:
            said += f"; the last steps of {dropped} episodes are left out, since what came after them was not recorded"
        return said

    def rows_of(self, episodes: np.ndarray) -> np.ndarray:
        """Which rows are of some episodes, bool [N].

        Args:
            episodes: their numbers, or bool [E].
        """
        chosen = np.zeros(len(self.begins), np.bool_)
        chosen[episodes] = True
        return np.repeat(chosen, self.ends - self.begins)

    def only(self, episodes: np.ndarray) -> "Recorded":
        """Some of the episodes.

        Args:
            episodes: their numbers, in rising order.
        """
        kept = self.rows_of(episodes)
        return Recorded(
            {path: x[kept] for path, x in self.columns.items()},
            self.reward[kept],
            self.terminated[kept],
            self.truncated[kept],
            self.closing[kept],
            begins=np.cumsum([0, *(self.ends - self.begins)[episodes][:-1]]),
            agents=None if self.agents is None else [self.agents[i] for i in episodes],
        )

    def to_go(self, gamma: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What is to come from each row on to the end of its episode: three arrays [N].

        The discounted sum of the rewards of its transition and all later ones; the discount of what comes after them,
        0 where the episode was terminated; and the row of the last observation, which comes after them.
        """
        is_transition, ends = self.is_transition, self.ends
        last = np.where(self.has_closing | self.is_dropped, ends - 1, ends)  # the row after the last transition
        reward = np.where(is_transition, self.reward.astype(np.float64), 0.0)
        keep = np.full(len(reward), gamma)
        keep[ends - 1] = 0.0
        total = discounted_sum(torch.from_numpy(reward)[None], torch.from_numpy(keep)[None])[0].numpy()
        sizes = ends - self.begins
        steps = np.repeat(last, sizes) - np.arange(len(reward))
        is_terminated = np.repeat(self.terminated[last - 1] & (last > self.begins), sizes)
        discount = np.where(is_terminated, 0.0, gamma**steps)
        return total.astype(np.float32), discount.astype(np.float32), np.repeat(ends - 1, sizes)


def joined(parts: Sequence[Recorded], agents: Sequence[str] | None = None) -> Recorded:
    """The episodes of several parts of equal columns, one after the other.

    Args:
        parts: at least one.
        agents: whose time line each episode is.
    """

    def concatenated(arrays: Sequence[np.ndarray]) -> np.ndarray:
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    begins = np.cumsum([0, *(len(part.reward) for part in parts)])
    return Recorded(
        {path: concatenated([part.columns[path] for part in parts]) for path in parts[0].columns},
        concatenated([part.reward for part in parts]),
        concatenated([part.terminated for part in parts]),
        concatenated([part.truncated for part in parts]),
        concatenated([part.closing for part in parts]),
        begins=np.concatenate([part.begins + begin for part, begin in zip(parts, begins)]),
        agents=agents,
    )


def first_not_finite(x: np.ndarray) -> int | None:
    """The first row of [N, ...] with a number that is not finite; None if there is none."""
    if x.dtype.kind != "f" or np.isfinite(x.sum()):  # the sum is cheaper than a mask
        return None
    wrong = ~np.isfinite(x).reshape(len(x), -1).all(1)
    return int(wrong.argmax()) if wrong.any() else None
