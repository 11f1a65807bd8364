"""What feeds an algorithm from recorded episodes that are read from files while it learns."""

from collections.abc import Mapping, Sequence
from typing import Any

from tensordict import TensorDict

from lit_rl.errors import CheckpointError, OptionError
from lit_rl.files.data_files import DataFiles, OwnDataset
from lit_rl.files.finding import File
from lit_rl.off_policy import OffPolicy
from lit_rl.replay.making import Making, row_bytes
from lit_rl.replay.ray_blocks import ReadDataset, ReadFiles, Reading, Shares, ray_blocks
from lit_rl.replay.recorded_feed import Draws
from lit_rl.replay.windows import Windows
from lit_rl.trees import iterate, nest

WINDOW = 2  # what a seed is for, beside those of ray_blocks
INSTEAD = {  # what needs all data in memory, and what to do
    "validation_fraction": "validate on files of their own",
    "top_fraction": "select episodes when you write the files",
    "a MultiAgent": "train a policy at a time",
    "prioritized replay": "set prioritized=False",
}


class StreamedFeed:
    """Minibatches of recorded episodes for one algorithm: each transition once in an epoch.

    Args:
        algorithm: with its networks.
        data: the episodes.
        draws: how many rows are a minibatch, and how many rewards are summed.
        shuffle_window: transitions that are shuffled together, less if they take more than a quarter of `memory_limit`.
        memory_limit: bytes, of which a quarter is for Ray's object store.
        shares: which files this rank reads, and when.
    """

    def __init__(
        self,
        algorithm: OffPolicy,
        data: DataFiles | OwnDataset,
        *,
        draws: Draws,
        shuffle_window: int,
        memory_limit: int,
        shares: Shares,
    ):
        draws.check(algorithm)
        policy, self._length = algorithm.policy, algorithm.sequence_length
        room = memory_limit // 4
        window = min(shuffle_window, room // row_bytes(policy.spec))
        self.algorithm, self.draws = algorithm, draws
        self._data, self._rows = data, max(1, window // (self._length or 1))
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
            lambda part: ray_blocks(reading, part, room),
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


def check_sizes(files: Sequence[tuple[File, int]], paths: Sequence[str], memory_limit: int) -> None:
    """Refuse what cannot be read one file at a time.

    Args:
        files: each with the bytes that it takes in memory.
        paths: which mean these files.
        memory_limit: bytes.

    Raises:
        OptionError: if a file takes more, or if there are no files.
    """
    if not files:
        raise OptionError(
            f"streaming=True: paths={list(paths)!r} are no files, and are read into memory. Leave it out."
        )
    largest, size = max(files, key=lambda found: found[1])
    if size > memory_limit:
        raise OptionError(
            f"{largest} takes {size:,} bytes in memory, more than memory_limit={memory_limit:,}. Write it as "
            "several files, or raise memory_limit."
        )


def check_streams(
    data: DataFiles | OwnDataset,
    paths: Sequence[str],
    asks: Mapping[str, bool],
    world_size: int,
    *,
    streaming: bool | None,
) -> None:
    """Refuse what needs all data in memory, or files for more learner processes.

    Args:
        data: that streams.
        paths: which mean it.
        asks: for each of `INSTEAD`, whether it is asked for.
        world_size: learner processes.
        streaming: whether that was asked for; None: the data is too large for memory.

    Raises:
        OptionError: if something is asked for, or there are too few files.
    """
    if isinstance(data, OwnDataset):
        why, advice = "paths is a ray.data.Dataset, and streams", "give the paths of files"
    elif streaming:
        why, advice = "streaming=True", "leave streaming out"
    else:
        why, advice = "the data is more than memory_limit, and streams", "raise memory_limit"
    for what, instead in INSTEAD.items():
        if asks[what]:
            raise OptionError(f"{why}: {what} needs all data in memory. Either {instead}, or {advice}.")
    if isinstance(data, OwnDataset) and world_size > 1:
        raise OptionError(
            f"paths is a ray.data.Dataset, which feeds one learner process, and there are {world_size}. Give the "
            "paths of files."
        )
    if world_size > len(data):
        raise OptionError(
            f"paths={list(paths)!r}: {len(data)} files stream to {world_size} learner processes: expected at least a "
            "file for each. Write more files, or train with fewer devices."
        )
