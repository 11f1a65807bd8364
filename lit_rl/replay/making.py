"""Making minibatches' rows of recorded episodes, all of them once. Processes beside the learner import this.

Shapes: M transitions or, with memory, sequences.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lit_rl.recorded import Recorded
from lit_rl.replay.recorded_buffer import RecordedBuffer
from lit_rl.spec import EnvSpec
from lit_rl.trees import iterate, nest, row_dtype, space_leaves

BLOCK_BYTES = 2 * 2**20  # of rows that are made at once
MOST_ROWS = 16_384


@dataclass(frozen=True)
class Making:
    """How rows are made of episodes: what `RecordedBuffer` draws at random, each row once.

    Attributes:
        spec: of the environment.
        acts: has `from_env`, which turns recorded actions into a policy's: see `as_policy_acts`.
        gamma: discount per env step.
        num_steps: the least and the most rewards that are summed.
        has_returns: whether there are returns to go, see `RecordedBuffer`.
        state: see `ReplayBuffer`.
        length: steps of a sequence; None: rows are transitions. Sequences are next to each other.
        burn_in: steps before each sequence.
    """

    spec: EnvSpec
    acts: Any
    gamma: float
    num_steps: tuple[int, int]
    has_returns: bool = False
    state: Mapping[str, np.ndarray] | None = None
    length: int | None = None
    burn_in: int = 0

    def __call__(self, recorded: Recorded, seed: np.random.SeedSequence) -> Iterator[dict[str, np.ndarray]]:
        """Arrays [M, ...] by path, such as "next/reward", until all rows were there, in an order that is drawn."""
        gamma = self.gamma if self.has_returns else None
        buffer = RecordedBuffer(
            as_policy_acts(self.acts, recorded), self.spec, state=self.state, gamma=gamma, seed=seed
        )
        heads = buffer.rows
        if self.length is not None:
            heads = heads_of_sequences(recorded, heads, self.length)
        heads = buffer.rng.permutation(heads)
        size = self._rows_at_once()
        options: dict[str, Any] = {"gamma": self.gamma, "num_steps": self.num_steps}
        for start in range(0, len(heads), size):
            index = heads[start : start + size]
            if self.length is None:
                rows = buffer.transitions(index, **options)
            else:
                rows = buffer.sequences(index, length=self.length, burn_in=self.burn_in, **options)
            yield {path: x.numpy() for path, x in rows.flatten_keys("/").items()}

    def _rows_at_once(self) -> int:
        row = row_bytes(self.spec) * (1 if self.length is None else self.length + self.burn_in)
        return min(max(BLOCK_BYTES // row, 1), MOST_ROWS)


def row_bytes(spec: EnvSpec) -> int:
    """About how many bytes a transition has: its action, its observation and the next one."""
    action, obs = (
        sum(
            np.dtype(row_dtype(leaf)).itemsize * int(np.prod(leaf.shape or ())) for leaf in space_leaves(space).values()
        )
        for space in (spec.action_space, spec.observation_space)
    )
    return action + 2 * obs


def as_policy_acts(policy: Any, recorded: Recorded) -> Recorded:
    """The same episodes with actions as a policy gives them, instead of as the environment was given them.

    A squashed policy's lie in [-1, 1] whatever the bounds are, and a Discrete one's begin at 0.

    Args:
        policy: has `from_env`, as a policy and its distribution have.
        recorded: the episodes.
    """
    columns = {path: x for path, x in recorded.columns.items() if path.partition("/")[0] == "action"}
    actions = policy.from_env(nest(columns)["action"])
    return replace(recorded, columns={**recorded.columns, **dict(iterate(actions, "action"))})


def heads_of_sequences(recorded: Recorded, rows: np.ndarray, length: int) -> np.ndarray:
    """Those rows with which sequences of `length` steps begin that are next to each other, from each episode's first.

    Args:
        recorded: the episodes.
        rows: numbers of some transitions.
        length: L.
    """
    firsts = recorded.begins[np.searchsorted(recorded.begins, rows, side="right") - 1]
    return rows[(rows - firsts) % length == 0]
