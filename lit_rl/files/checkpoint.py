"""Checkpoint files: written whole or not at all, readable without running any code of theirs."""

import contextlib
import os
import random
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins import CheckpointIO
from torch import Tensor, nn

from lit_rl.errors import CheckpointError, write_error
from lit_rl.files import digests
from lit_rl.files.atomic import flush, remove_strays, temporary_file
from lit_rl.files.loading import SECTION, previous_of, read_checkpoint, read_one, section
from lit_rl.files.snapshots import attach


class LitCheckpointIO(CheckpointIO):
    """Writes a checkpoint to a temporary file beside its target, flushes it to disk, and renames it.

    A crash or a full disk leaves the previous file as it was. What `weights_only` loading would refuse on the day of
    the resume is refused when it is saved, with the key that holds it.

    Args:
        keeps_replaced: whether the file that one at this path replaces stays, as `<path>.previous`; None: always.
    """

    def __init__(self, keeps_replaced: Callable[[Path], bool] | None = None) -> None:
        self._keeps_replaced = keeps_replaced or (lambda path: True)
        # By target, what this object wrote there: how to know it again, and the files beside it.
        self._written: dict[Path, tuple[Any, set[Path]]] = {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if storage_options is not None:
            raise CheckpointError(f"storage_options={storage_options!r}: checkpoints are written to local files only.")
        check_plain(checkpoint, "checkpoint")
        target = Path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            remove_strays(target.parent)
            kept, files = self._newest_whole(target)
            keeps = previous_of(target).exists() or self._keeps_replaced(target)
            # Files have names of their own, never used again: until the new checkpoint is in place, all sets are there.
            beside = _attach_replay(checkpoint, target)
            with temporary_file(target) as file:
                torch.save(checkpoint, file)
                digests.seal(file)
                file.flush()
                os.fsync(file.fileno())
                if kept == target and keeps:
                    _keep(target)
                os.replace(file.name, target)
            flush(target.parent)
            self._written[target] = _identity(target), beside
            _remove_others(target, beside | files if keeps else beside)
        except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
            raise CheckpointError(
                f"Cannot write the checkpoint {target}: {write_error(error)}. The previous one is kept."
            ) from error

    def load_checkpoint(
        self,
        path: Any,
        map_location: Callable | None = lambda storage, _: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        checkpoint = read_checkpoint(path, map_location)
        section(checkpoint, path)  # refused by name, before Lightning looks for what it writes itself
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        previous_of(path).unlink(missing_ok=True)
        Path(path).unlink(missing_ok=True)
        shutil.rmtree(files_beside(path), ignore_errors=True)

    def _newest_whole(self, target: Path) -> tuple[Path | None, set[Path]]:
        """Of the target and the one it replaced, the first that can be read, and the files beside it."""
        identity, files = self._written.get(target, (None, set()))
        if target.exists() and identity == _identity(target):
            return target, files
        for path in (target, previous_of(target)):
            with contextlib.suppress(CheckpointError):
                return path, _replay_files(read_one(path), target)
        return None, set()


def files_beside(path: Any) -> Path:
    """The folder of what is too large for a checkpoint's file, `<checkpoint>.d`, also of the one it replaced."""
    return Path(f"{str(path).removesuffix('.previous')}.d")


def _identity(path: Path) -> tuple[int, ...]:
    """What changes with the file."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _keep(target: Path) -> None:
    """Give the target its second name. At every moment one of the two is there, and whole."""
    previous = previous_of(target)
    previous.unlink(missing_ok=True)
    try:
        os.link(target, previous)
    except OSError:  # a file system without hard links
        os.replace(target, previous)


def _replays(checkpoint: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a checkpoint says of each rank's replay buffer, or of several, with the name of the rank's folder."""
    for rank, state in enumerate(checkpoint.get(SECTION, {}).get("ranks", ())):
        data = state.get("data", {})
        for replay in [data["replay"]] if "replay" in data else data.get("replays", {}).values():
            yield f"rank_{rank}", replay


def _replay_files(checkpoint: dict[str, Any], target: Path) -> set[Path]:
    return {files_beside(target) / rank / name for rank, replay in _replays(checkpoint) for name in replay["files"]}


def _attach_replay(checkpoint: dict[str, Any], target: Path) -> set[Path]:
    """Bring every rank's replay buffer beside the checkpoint; returns the files."""
    for rank, replay in _replays(checkpoint):
        attach(replay["files"], Path(replay.pop("folder")), files_beside(target) / rank)
    return _replay_files(checkpoint, target)


def _remove_others(target: Path, keep: set[Path]) -> None:
    """Remove what checkpoints that are no longer kept had beside them."""
    for path in files_beside(target).glob("rank_*/*"):
        if path not in keep:
            path.unlink()
    if not keep:
        shutil.rmtree(files_beside(target), ignore_errors=True)


def check_plain(value: Any, where: str) -> None:
    """Refuse what torch's `weights_only` loading cannot read.

    Raises:
        CheckpointError: naming the key and the type of the first such value.
    """
    if value is None or type(value) in (bool, int, float, str, bytes, torch.Size, torch.dtype, torch.device):
        return
    if type(value) in (Tensor, nn.Parameter):
        return
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            check_plain(key, f"{where} (a key)")
            check_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple, set):
        for index, item in enumerate(value):
            check_plain(item, f"{where}[{index}]")
    else:
        raise CheckpointError(
            f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint cannot hold: "
            "expected tensors, numbers, strings, and lists and dicts of them. Convert it in state_dict()."
        )


def rng_state() -> dict[str, Any]:
    """The state of this process's random number generators (Python, numpy, torch, CUDA), as plain data."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Go on from what `rng_state` returned."""
    random.setstate(state["python"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
