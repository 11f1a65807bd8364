"""Reading files through Ray Data, in processes beside the learner. Ray runs already when this is used."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from lit_rl.errors import DataError, LitRLError
from lit_rl.files.data_files import DataFiles, OwnDataset
from lit_rl.files.recorded import read_rows
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
        order = np.random.default_rng(child(self.seed, ORDER, self.epoch_of(part))).permutation(self.num_files)
        return int(order[place])

    def seed_of_rows(self, part: int, *key: int) -> np.random.SeedSequence:
        """What is drawn of the rows of a part depends on this."""
        return child(self.seed, ROWS, self.epoch_of(part), self.file_of(part), *key)


class Reading:
    """Makes rows in worker processes of Ray. A subclass says of what."""

    def rows_from(self, part: int) -> tuple[Any, int]:
        """A `ray.data.Dataset` of the rows of a part and of some that follow, and the part that comes after these.

        The column "part" says of which part a row is.
        """
        raise NotImplementedError(f"{type(self).__name__} must define rows_from(part).")


class ReadFiles(Reading):
    """Makes the rows of files: a part is one file.

    Args:
        files: that there are.
        making: how rows are made.
        shares: which file a part is.
    """

    def __init__(self, files: DataFiles, making: Making, shares: Shares):
        self._files, self._making, self._shares = files, making, shares

    def rows_from(self, part: int) -> tuple[Any, int]:
        import ray.data

        parts = range(part, part + max(PARTS, len(self._files)))
        numbers = ray.data.from_items([{"part": number} for number in parts], override_num_blocks=len(parts))
        return numbers.map_batches(self, batch_size=1, batch_format="numpy"), parts.stop

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        _be_quiet()
        for part in batch["part"].tolist():
            for rows in self.rows(part):
                yield {"part": np.full(_num(rows), part), **rows}

    def rows(self, part: int) -> Iterator[dict[str, np.ndarray]]:
        """Arrays of the rows of a part by path, some rows at a time: always the same ones."""
        recorded = self._files.read(self._shares.file_of(part))
        yield from self._making(recorded, self._shares.seed_of_rows(part))


class ReadDataset(Reading):
    """Makes the rows of a data set of the user's: a part is all of it, which is one epoch.

    Args:
        own: the data set.
        making: how rows are made.
        seed: of what is drawn.
    """

    def __init__(self, own: OwnDataset, making: Making, seed: np.random.SeedSequence):
        self._dataset, self._making, self._seed = own.dataset, making, seed
        self._options: dict[str, Any] = {"columns": own.columns, "preset": own.preset, "spec": own.spec}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_dataset": None}  # a worker is given its rows

    def rows_from(self, part: int) -> tuple[Any, int]:
        rows = self._dataset.map_batches(self, batch_size=None, batch_format="numpy", fn_kwargs={"part": part})
        return rows, part + 1

    def __call__(self, batch: dict[str, np.ndarray], part: int) -> Iterator[dict[str, np.ndarray]]:
        _be_quiet()
        recorded, _ = read_rows(batch, **self._options)
        for rows in self._making(recorded, child(self._seed, ROWS, part)):
            yield {"part": np.full(_num(rows), part), **rows}


def ray_blocks(reading: Reading, part: int, store_bytes: int) -> Iterator[Block]:
    """The rows of a part and of all that come after it, read ahead by processes of Ray.

    Blocks come in the order of the parts, whichever was read first (`preserve_order`): what is learned from depends on
    the seed alone. If a process is lost, Ray reads its file again and goes on after the blocks that came.

    Args:
        reading: makes rows.
        part: with which to begin.
        store_bytes: that rows may take in Ray's object store.

    Raises:
        DataError: as `DataFiles.read`, or if there are no transitions at all.
    """
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    while True:
        rows, part = reading.rows_from(part)
        context = rows.context
        context.enable_progress_bars = False
        context.target_max_block_size = BLOCK_BYTES
        context.execution_options.preserve_order = True
        context.execution_options.resource_limits = ray.data.ExecutionResources(
            object_store_memory=max(store_bytes, LEAST_STORE)
        )
        is_empty = True
        try:
            for block in rows.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2):
                is_empty = False
                yield int(block["part"][0]), {path: x for path, x in block.items() if path != "part"}
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, LitRLError):  # its sentence alone, after which Ray Data puts advice of its own
                raise type(error.cause)(str(error.cause).partition("\n")[0]) from None
            raise
        if is_empty:
            raise DataError("paths: the data holds no transitions. Give other data.")


def child(seed: np.random.SeedSequence, *key: int) -> np.random.SeedSequence:
    """A seed that depends on another one and on some numbers."""
    return np.random.SeedSequence(seed.entropy, spawn_key=(*seed.spawn_key, *key))


def _num(rows: dict[str, np.ndarray]) -> int:
    return len(next(iter(rows.values())))


def _be_quiet() -> None:
    """Messages are for the learner's log, where they were when the data was looked at."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
