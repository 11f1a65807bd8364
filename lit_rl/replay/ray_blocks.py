"""Reading files through Ray Data, in processes beside the learner. Ray runs already when this is used."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from lit_rl.errors import DataError, LitRLError
from lit_rl.files.data_files import DataFiles
from lit_rl.replay.making import Making
from lit_rl.replay.windows import Block

PARTS = 256  # at least so many files are read by one execution of Ray Data, which takes a second to begin
BLOCK_BYTES = 4 * 2**20
LEAST_STORE = 64 * 2**20  # bytes: with less, files are hardly read ahead
ORDER, ROWS = range(2)  # what a seed is for: its key's last numbers but those of the epoch and the file


@dataclass(frozen=True)
class Shares:
    """Which file is read when, by which rank.

    The files of one epoch after the other, each epoch's in an order of its own, are dealt to the ranks in turn: so
    every rank's rows never end, and over a few epochs it reads every file as often as the others do.

    Attributes:
        num_files: of the data set.
        seed: of the orders.
        rank, world_size: of this learner process, and how many there are.
    """

    num_files: int
    seed: np.random.SeedSequence
    rank: int = 0
    world_size: int = 1

    def epoch_of(self, part: int) -> int:
        """The epoch to which this rank's `part`-th file belongs."""
        return (self.rank + part * self.world_size) // self.num_files

    def file_of(self, part: int) -> int:
        """The number of this rank's `part`-th file."""
        place = (self.rank + part * self.world_size) % self.num_files
        return int(np.random.default_rng(self._child(ORDER, self.epoch_of(part))).permutation(self.num_files)[place])

    def seed_of_rows(self, part: int, *key: int) -> np.random.SeedSequence:
        """What is drawn of the rows of a part depends on this."""
        return self._child(ROWS, self.epoch_of(part), self.file_of(part), *key)

    def _child(self, *key: int) -> np.random.SeedSequence:
        return np.random.SeedSequence(self.seed.entropy, spawn_key=(*self.seed.spawn_key, *key))


class ReadFile:
    """Makes the rows of files in a worker process of Ray.

    Args:
        files: that there are.
        making: how rows are made.
        shares: which file a part is.
    """

    def __init__(self, files: DataFiles, making: Making, shares: Shares):
        self._files, self._making, self._shares = files, making, shares

    @property
    def num_files(self) -> int:
        return len(self._files)

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        # Messages are for the learner's log, where they were when the first file was looked at.
        logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
        for part in batch["part"].tolist():
            for rows in self.rows(part):
                num = len(next(iter(rows.values())))
                yield {"part": np.full(num, part, np.int64), **rows}

    def rows(self, part: int) -> Iterator[dict[str, np.ndarray]]:
        """Arrays of the rows of a part by path, some rows at a time: always the same ones."""
        recorded = self._files.read(self._shares.file_of(part))
        yield from self._making(recorded, self._shares.seed_of_rows(part))


def ray_blocks(read: ReadFile, part: int, store_bytes: int) -> Iterator[Block]:
    """The rows of a part and of all that come after it, read ahead by processes of Ray.

    Blocks come in the order of the parts, whichever was read first (`preserve_order`): what is learned from depends on
    the seed alone. If a process is lost, Ray reads its file again and goes on after the blocks that came.

    Args:
        read: makes rows.
        part: with which to begin.
        store_bytes: that rows may take in Ray's object store.

    Raises:
        DataError: as `DataFiles.read`, or if there are no transitions at all.
    """
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    while True:
        parts = range(part, part + max(PARTS, read.num_files))
        numbers = ray.data.from_items([{"part": number} for number in parts], override_num_blocks=len(parts))
        context = numbers.context
        context.enable_progress_bars = False
        context.target_max_block_size = BLOCK_BYTES
        context.execution_options.preserve_order = True
        context.execution_options.resource_limits = ray.data.ExecutionResources(
            object_store_memory=max(store_bytes, LEAST_STORE)
        )
        rows = numbers.map_batches(read, batch_size=1, batch_format="numpy")
        is_empty = True
        try:
            for block in rows.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2):
                is_empty = False
                yield int(block["part"][0]), {path: x for path, x in block.items() if path != "part"}
        except ray.exceptions.RayError as error:
            raise _cause(error) from error
        if is_empty:
            raise DataError("paths: the files hold no transitions. Give others.")
        part = parts.stop


def _cause(error: BaseException) -> BaseException:
    """The mistake that a process of Ray found, if it is one that a user can mend; else the error itself."""
    found: Any = error
    while found is not None:
        if isinstance(found, LitRLError):
            return found
        found = getattr(found, "cause", None) or found.__cause__
    return error
