"""What feeds an algorithm from recorded episodes that are read from files while it learns."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tensordict import TensorDict

from lit_rl.errors import CheckpointError
from lit_rl.files.data_files import DataFiles, OwnDataset
from lit_rl.off_policy import OffPolicy
from lit_rl.replay.making import Making
from lit_rl.replay.ray_blocks import ReadDataset, ReadFiles, Reading, Shares
from lit_rl.replay.recorded_feed import Draws
from lit_rl.replay.windows import Block, Windows
from lit_rl.trees import iterate, nest

WINDOW = 2  # what a seed is for, beside those of ray_blocks


class StreamedFeed:
    """Minibatches of recorded episodes for one algorithm: each transition once in an epoch.

    Args:
        algorithm: with its networks.
        data: the episodes.
        draws: how many rows are a minibatch, and how many rewards are summed.
        window_rows: transitions that are shuffled together.
        shares: which files this rank reads, and when.
        blocks: given what makes rows and the number of a part, its blocks and all that come after: see `ray_blocks`.
    """

    def __init__(
        self,
        algorithm: OffPolicy,
        data: DataFiles | OwnDataset,
        *,
        draws: Draws,
        window_rows: int,
        shares: Shares,
        blocks: Callable[[Reading, int], Iterator[Block]],
    ):
        draws.check(algorithm)
        policy, self._length = algorithm.policy, algorithm.sequence_length
        self.algorithm, self.draws = algorithm, draws
        self._data, self._rows = data, max(1, window_rows // (self._length or 1))
        making = Making(
            policy.spec,
            policy.distribution,
            algorithm.gamma,
            draws.num_steps,
            has_returns=algorithm.wants_returns_to_go,
            state=dict(iterate(policy.initial_state(1), "state")) if policy.has_memory else None,
            length=self._length,
            burn_in=algorithm.burn_in if self._length else 0,
        )
        reading: Reading
        if isinstance(data, DataFiles):
            reading = ReadFiles(data, making, shares)
        else:
            reading = ReadDataset(data, making, shares.seed)
        self._windows = Windows(
            lambda part: blocks(reading, part),
            epoch_of=shares.epoch_of,
            size=self._rows,
            seed=lambda part, row: shares.seed_of_rows(part, WINDOW, row),
        )

    def draw(self, beta: float) -> TensorDict:
        """A minibatch, on the algorithm's device."""
        num, device = self.draws.batch_size // (self._length or 1), self.algorithm.device
        minibatch = TensorDict(nest(self._windows.take(num)), [num])
        return minibatch if device.type == "cpu" else minibatch.to(device, non_blocking=True)

    def learned(self, minibatch: TensorDict) -> None:
        """Nothing is done with priorities, of which there are none."""

    def close(self) -> None:
        """End what reads files."""
        self._windows.close()

    # --- checkpoints --------------------------------------------------------------------------------------------

    def position(self, *, whole: bool = True) -> dict[str, Any]:
        """Where in the data it is, in plain data: the epoch, the file, the row, and of which files."""
        return {**self._windows.position(), "window": self._rows, "files": self._data.digest}

    def go_on(self, position: Mapping[str, Any]) -> None:
        """Draw what was to be drawn next when `position` was asked; of a data set of the user's the epoch anew.

        Raises:
            CheckpointError: if there were other files, or windows of another size.
        """
        here = self.position()
        if "files" not in position or position["files"] != here["files"]:
            raise CheckpointError(
                "The checkpoint's run read other files, or had its data in memory. Resume with the same files and the "
                "same memory_limit and streaming, or begin a new run with init_from."
            )
        if position["window"] != self._rows:
            raise CheckpointError(
                f"The checkpoint's run shuffled windows of {position['window']} rows, here they have {self._rows}. "
                "Resume with the same shuffle_window, memory_limit and sequence_length."
            )
        if isinstance(self._data, OwnDataset):  # of which nobody knows in which order its rows come
            position = {**position, "row": 0, "taken": 0}
        self._windows.go_on(position)
