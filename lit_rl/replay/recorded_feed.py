"""What feeds an algorithm from recorded episodes: minibatches to learn from, and held-out rows to judge it by."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tensordict import TensorDict
from torch import Tensor

from lit_rl.errors import CheckpointError, OptionError
from lit_rl.off_policy import OffPolicy
from lit_rl.policy.mapping import EpisodeInfo, PolicyMapping
from lit_rl.recorded import Recorded
from lit_rl.replay.feed import drawn
from lit_rl.replay.making import as_policy_acts, heads_of_sequences
from lit_rl.replay.recorded_buffer import RecordedBuffer
from lit_rl.trees import iterate


@dataclass(frozen=True)
class Draws:
    """How minibatches are drawn.

    Attributes:
        batch_size: rows of a minibatch.
        num_steps: the least and the most rewards that are summed.
        priority_alpha: see `ReplayBuffer`.
    """

    batch_size: int
    num_steps: tuple[int, int]
    priority_alpha: float | None

    @classmethod
    def of(
        cls,
        algorithm: OffPolicy,
        *,
        batch_size: int | None,
        n_step: int | Sequence[int] | None,
        prioritized: bool | None,
        priority_alpha: float,
    ) -> "Draws":
        """What is asked for or, if that is None, what the algorithm has as `OffPolicy.REPLAY`."""
        own = algorithm.REPLAY
        steps: Any = own["n_step"] if n_step is None else n_step
        low, high = (steps, steps) if isinstance(steps, int) else steps
        is_prioritized = own["prioritized"] if prioritized is None else prioritized
        return cls(batch_size or own["batch_size"], (low, high), priority_alpha if is_prioritized else None)

    def check(self, algorithm: OffPolicy) -> None:
        """Refuse minibatches that hold no sequence.

        Raises:
            OptionError: if an algorithm with memory would be given such.
        """
        length = algorithm.sequence_length
        if length is not None and self.batch_size < length:
            raise OptionError(
                f"batch_size={self.batch_size}: expected at least one sequence, sequence_length={length} rows. "
                "Raise it."
            )


class RecordedFeed:
    """Minibatches of recorded episodes for one algorithm.

    Args:
        algorithm: with its networks.
        recorded: the episodes.
        rows: numbers of the transitions that this rank draws.
        held_out: of those that no rank draws, to judge the algorithm by.
        draws: how they are drawn.
        seed: of what is drawn.
        rank, world_size: this rank judges by its share of those.
    """

    def __init__(
        self,
        algorithm: OffPolicy,
        recorded: Recorded,
        *,
        rows: np.ndarray,
        held_out: np.ndarray,
        draws: Draws,
        seed: np.random.SeedSequence,
        rank: int = 0,
        world_size: int = 1,
    ):
        policy, length = algorithm.policy, algorithm.sequence_length
        draws.check(algorithm)
        self.algorithm, self.draws = algorithm, draws
        recorded = as_policy_acts(policy, recorded)
        options: dict[str, Any] = {
            "state": dict(iterate(policy.initial_state(1), "state")) if policy.has_memory else None,
            "gamma": algorithm.gamma if algorithm.wants_returns_to_go else None,
        }
        self.buffer = RecordedBuffer(
            recorded, policy.spec, rows=rows, priority_alpha=draws.priority_alpha, seed=seed, **options
        )
        self.held_out = RecordedBuffer(recorded, policy.spec, rows=held_out, has_is_init=True, **options)
        heads = held_out
        if length is not None:
            heads = heads_of_sequences(recorded, held_out, length)
        self._heads = np.array_split(heads, world_size)[rank]
        self._greatest_share = -(-len(heads) // world_size)

    # --- to learn from ------------------------------------------------------------------------------------------

    def draw(self, beta: float, num: int | None = None) -> TensorDict:
        """A minibatch, on the algorithm's device.

        Args:
            beta: see `ReplayBuffer.sample`.
            num: rows of it; None: `batch_size`.
        """
        draws = self.draws
        return self._moved(drawn(self.buffer, self.algorithm, num or draws.batch_size, draws.num_steps, beta))

    def learned(self, minibatch: TensorDict) -> None:
        """A `priority` that `update` wrote into a minibatch goes back to its rows."""
        if "priority" in minibatch.keys():  # noqa: SIM118
            self.buffer.update_priorities(minibatch["index"], minibatch["priority"])

    def position(self, *, whole: bool = True) -> dict[str, Any]:
        """What is to be drawn next: see `RecordedBuffer.position`."""
        return self.buffer.position(whole=whole)

    def go_on(self, position: Mapping[str, Any]) -> None:
        """Draw what was to be drawn next when `position` was asked.

        Raises:
            CheckpointError: if that was of other data.
        """
        if "files" in position:
            raise CheckpointError(
                "In the checkpoint's run the data streamed, here it is in memory. Resume with the same streaming and "
                "memory_limit, or begin a new run with init_from."
            )
        self.buffer.go_on(position)

    def close(self) -> None:
        """Nothing to end."""

    # --- to judge by --------------------------------------------------------------------------------------------

    @property
    def num_parts(self) -> int:
        """Minibatches of held-out rows: of the rank that has the most of them."""
        return -(-self._greatest_share // self._part_size)

    @property
    def _part_size(self) -> int:
        return max(1, self.draws.batch_size // (self.algorithm.sequence_length or 1))

    def judged(self) -> Iterator[dict[str, tuple[float, int]]]:
        """What the algorithm says of each minibatch of held-out rows: by metric the sum of its values, and how many."""
        algorithm, size = self.algorithm, self._part_size
        options: dict[str, Any] = {"gamma": algorithm.gamma, "num_steps": self.draws.num_steps}
        for start in range(0, len(self._heads), size):
            index = self._heads[start : start + size]
            if algorithm.sequence_length is None:
                minibatch = self.held_out.transitions(index, **options)
            else:
                options |= {"length": algorithm.sequence_length, "burn_in": algorithm.burn_in}
                minibatch = self.held_out.sequences(index, **options)
            found: Mapping[str, Tensor] = algorithm.judge(self._moved(minibatch))
            yield {name: (float(x.double().sum()), x.numel()) for name, x in found.items()}

    def _moved(self, minibatch: TensorDict) -> TensorDict:
        device = self.algorithm.device
        return minibatch if device.type == "cpu" else minibatch.to(device, non_blocking=True)


def episodes_of(recorded: Recorded, policy_id: str, mapping: PolicyMapping | None) -> np.ndarray:
    """The numbers of the episodes that a policy learns from: those of the agents that act by it.

    Args:
        recorded: the episodes.
        policy_id: of the policy.
        mapping: which agent acts by which; None if the policy is the only one.

    Raises:
        OptionError: if there are none, or it cannot be known.
    """
    if mapping is None:
        return np.arange(len(recorded.begins))
    if mapping.is_function:
        raise OptionError(
            "policy_mapping: a function says who acts by which policy in an episode that is played. For recorded ones "
            "expected a policy's id, or a dict of patterns."
        )
    names = recorded.agents or ()
    mapped = {name: mapping.policy_of(name, EpisodeInfo(0, None, np.random.default_rng(0))) for name in set(names)}
    found = np.flatnonzero([mapped[name] == policy_id for name in names])
    if not len(found):
        raise OptionError(
            f"policies[{policy_id!r}]: policy_mapping gives it none of the agents {sorted(mapped)} that were recorded."
        )
    return found


def rows_of_rank(recorded: Recorded, episodes: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """A rank's share of the transitions of some episodes: as many as any other rank's, one after the other.

    Where their number is no multiple of the ranks', the last few are left out.

    Args:
        episodes: numbers of the episodes, or bool [E].
    """
    rows = np.flatnonzero(recorded.is_transition & recorded.rows_of(episodes))
    share = len(rows) // world_size
    return rows[rank * share : (rank + 1) * share]


def best(recorded: Recorded, episodes: np.ndarray, fraction: float) -> np.ndarray:
    """The numbers of a fraction of some episodes, at least one: those of the greatest returns, in their order."""
    count = max(1, round(fraction * len(episodes)))
    return np.sort(episodes[np.argsort(-recorded.returns[episodes], kind="stable")[:count]])


def split(episodes: np.ndarray, fraction: float, seed: np.random.SeedSequence) -> tuple[np.ndarray, np.ndarray]:
    """Some episodes to learn from, and a random fraction of them, at least one, to judge by.

    Raises:
        OptionError: if there are too few.
    """
    if not fraction:
        return episodes, episodes[:0]
    count = max(1, round(fraction * len(episodes)))
    if count >= len(episodes):
        raise OptionError(
            f"validation_fraction={fraction:g}: {count} of {len(episodes)} episodes would be held out. Expected "
            "some to be left. Lower it."
        )
    is_held_out = np.zeros(len(episodes), np.bool_)
    is_held_out[np.random.default_rng(seed).permutation(len(episodes))[:count]] = True
    return episodes[~is_held_out], episodes[is_held_out]
