"""A replay buffer on disk: memory-mapped columns, and snapshots of which only what changed is written anew."""

import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lit_rl.errors import CheckpointError, ReplayError, write_error
from lit_rl.files import digests
from lit_rl.files.atomic import flush

GROWTH = 64 * 2**20  # bytes by which a file on disk grows
CHUNK_ROWS = 4096  # rows of a snapshot's file


class DiskColumns:
    """Arrays [capacity, ...] in memory-mapped files, in a new folder inside `storage_dir`.

    The files grow as rows are written. The space is reserved before it is written to: a full disk is an error of ours,
    not a SIGBUS.

    Attributes:
        columns: the arrays by name.
    """

    def __init__(self, storage_dir: str | Path, capacity: int, fields: Mapping[str, tuple[str, tuple[int, ...]]]):
        try:
            Path(storage_dir).mkdir(parents=True, exist_ok=True)
            # Gone with this object, at the latest when the program ends.
            self._temporary = tempfile.TemporaryDirectory(prefix="replay-", dir=storage_dir)
        except OSError as error:
            raise ReplayError(
                f"storage_dir={str(storage_dir)!r}: {error.strerror}. Name a folder to write to."
            ) from None
        self._folder = Path(self._temporary.name)
        self._capacity = capacity
        self._reserved = 0
        self.columns: dict[str, np.ndarray] = {}
        self._row_bytes: dict[Path, int] = {}
        for number, (name, (dtype, shape)) in enumerate(fields.items()):
            file = self._folder / f"{number}.bin"
            self.columns[name] = np.memmap(file, dtype, "w+", shape=(capacity, *shape))
            self._row_bytes[file] = self.columns[name].nbytes // capacity
        self._block = max(1, GROWTH // max(sum(self._row_bytes.values()), 1))

    def reserve(self, num_rows: int) -> None:
        """Have disk space for the first `num_rows` rows.

        Raises:
            ReplayError: if there is none left.
        """
        if num_rows <= self._reserved:
            return
        end = min(max(num_rows, self._reserved + self._block), self._capacity)
        try:
            for file, row_bytes in self._row_bytes.items():
                with file.open("r+b") as handle:
                    os.posix_fallocate(handle.fileno(), self._reserved * row_bytes, (end - self._reserved) * row_bytes)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            needed = (self._capacity - self._reserved) * sum(self._row_bytes.values()) / 2**30
            raise ReplayError(
                f"storage_dir={str(self._folder.parent)!r}: the disk is full after {self._reserved} of "
                f"buffer_size={self._capacity} rows; the rest takes {needed:.2f} GiB. Free some space or lower "
                "buffer_size, and resume from the last checkpoint."
            ) from None
        self._reserved = end


class Snapshots:
    """Writes an array's rows as files of `CHUNK_ROWS` rows each, and only those that changed since the last time.

    A file is never changed: a chunk that is written again gets a new name. So files can be shared, by hard links,
    between several checkpoints.
    """

    def __init__(self, capacity: int):
        self._files: list[tuple[str, list[Any]]] = [("", [])] * -(-capacity // CHUNK_ROWS)  # and what is in them
        self._changed = np.ones(len(self._files), np.bool_)

    def touch(self, *rows: np.ndarray) -> None:
        """Say that rows changed."""
        for some in rows:
            self._changed[some // CHUNK_ROWS] = True

    def write(
        self, folder: Path, columns: Mapping[str, np.ndarray], num_rows: int, whole: Mapping[str, np.ndarray]
    ) -> dict[str, list[Any]]:
        """Bring `folder` up to date with the first `num_rows` rows; returns size and SHA-256 of its files, by name.

        Args:
            folder: the same in each call.
            columns: arrays [capacity, ...] by name.
            num_rows: how many were ever written.
            whole: small arrays that are written every time.
        """
        files = {}
        for chunk in range(-(-num_rows // CHUNK_ROWS)):
            name, content = self._files[chunk]
            if self._changed[chunk] or not (folder / name).exists():
                start, end = chunk * CHUNK_ROWS, min((chunk + 1) * CHUNK_ROWS, num_rows)
                name = f"{chunk:06d}-{uuid.uuid4().hex[:12]}.pt"
                rows = {key: torch.from_numpy(x[start:end].copy()) for key, x in columns.items()}
                content = _save(folder / name, rows)
                self._files[chunk], self._changed[chunk] = (name, content), False
            files[name] = content
        if whole:
            name = f"whole-{uuid.uuid4().hex[:12]}.pt"
            files[name] = _save(folder / name, {key: torch.from_numpy(x.copy()) for key, x in whole.items()})
        for old in folder.glob("*.pt"):
            if old.name not in files:
                old.unlink()
        return files

    def read(
        self, folder: Path, files: Mapping[str, list[Any]] | list[str], columns: Mapping[str, np.ndarray]
    ) -> dict[str, torch.Tensor]:
        """Fill `columns` from the files `write` returned; returns what was written whole.

        Args:
            folder: where they are.
            files: names alone if an older lit_rl wrote them.
            columns: as for `write`.

        Raises:
            CheckpointError: if a file is missing, or is not what was written.
        """
        whole = {}
        for name in files:
            try:
                content = _load(folder / name, files[name] if isinstance(files, Mapping) else None)
                if name.startswith("whole"):
                    whole = content
                    continue
                start = int(name[:6]) * CHUNK_ROWS
                for key, column in columns.items():
                    column[start : start + len(content[key])] = content[key].numpy()
            except Exception as error:  # zipfile and torch name a dozen kinds of damage
                message = " ".join(str(error).split())[:200]
                raise CheckpointError(
                    f"The checkpoint's replay buffer {folder / name} is missing or damaged: {message}. "
                    f"Move {folder.parent} along with the checkpoint, resume from the checkpoint before it "
                    "(<checkpoint>.previous), or with checkpoint_buffer=False and an empty buffer."
                ) from error
        return whole


def _save(path: Path, content: dict[str, torch.Tensor]) -> list[Any]:
    try:
        with path.open("w+b") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
            return digests.describe(file)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
        path.unlink(missing_ok=True)
        raise CheckpointError(
            f"Cannot write the replay buffer to {path.parent}: {write_error(error)}. The previous checkpoint is kept."
        ) from error


def _load(path: Path, written: list[Any] | None) -> dict[str, torch.Tensor]:
    with path.open("rb") as file:
        if written is None:
            digests.check(file)
        elif digests.describe(file) != written:
            raise ValueError("its contents are not those that were written")
        return torch.load(file, weights_only=True)


def attach(files: Iterable[str], source: Path, target: Path) -> None:
    """Make `files` of `source` appear in `target`: as hard links where the file system has them.

    Raises:
        CheckpointError: if another machine holds them.
    """
    if not source.is_dir():
        raise CheckpointError(
            f"The replay buffer's files in {source} are on another machine. Have all learners log to a folder that "
            "they share (save_dir of the logger, or trainer.default_root_dir), or set data.checkpoint_buffer=false."
        )
    target.mkdir(parents=True, exist_ok=True)
    for name in files:
        if not (target / name).exists():
            try:
                os.link(source / name, target / name)
            except OSError:
                partial = target / f".{name}.tmp"
                shutil.copy2(source / name, partial)
                flush(partial)
                os.replace(partial, target / name)
    flush(target)
