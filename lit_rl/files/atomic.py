"""Files that are there whole or not at all, whatever happens while they are written."""

import contextlib
import fcntl
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

TEMPORARY = ".lit_rl.tmp"  # the end of a file's name while it is written


@contextlib.contextmanager
def temporary_file(target: Path) -> Iterator[BinaryIO]:
    """A new file beside `target`, locked as long as this process lives and writes it; removed if it is still there."""
    while True:
        path = target.parent / f".{target.name}.{uuid.uuid4().hex[:12]}{TEMPORARY}"
        with path.open("x+b") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            if not os.fstat(file.fileno()).st_nlink:
                continue  # another process took it for a stray before it was locked
            try:
                yield file
            finally:
                path.unlink(missing_ok=True)
            return


def remove_strays(folder: Path) -> None:
    """Remove temporary files of processes that were killed: those that nobody holds a lock on."""
    for path in folder.glob(f".*{TEMPORARY}"):
        with contextlib.suppress(OSError), path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def flush(path: Path) -> None:
    """Have a file, or the names in a folder, on disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
