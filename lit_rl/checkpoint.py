"""Checkpoint files: written whole or not at all, readable without running any code of theirs."""

import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins import CheckpointIO
from torch import Tensor

from lit_rl.errors import CheckpointError
from lit_rl.loading import SECTION, read_checkpoint
from lit_rl.replay_files import attach


class LitCheckpointIO(CheckpointIO):
    """Writes a checkpoint to a temporary file beside its target, flushes it to disk, and renames it.

    A crash or a full disk leaves the previous file as it was. What `weights_only` loading would refuse on the day of
    the resume is refused when it is saved, with the key that holds it.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if storage_options is not None:
            raise CheckpointError(f"storage_options={storage_options!r}: checkpoints are written to local files only.")
        check_plain(checkpoint, "checkpoint")
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        try:
            # Files have names of their own, never used again: until the new checkpoint is in place, both sets are
            # there.
            beside = _attach_replay(checkpoint, target)
            with os.fdopen(handle, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
            _fsync_folder(target.parent)
            _remove_others(target, beside)
        except OSError as error:
            raise CheckpointError(
                f"Cannot write the checkpoint {target}: {error}. The previous one is kept."
            ) from error
        finally:
            Path(temporary).unlink(missing_ok=True)

    def load_checkpoint(
        self,
        path: Any,
        map_location: Callable | None = lambda storage, _: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        return read_checkpoint(path, map_location)

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)
        shutil.rmtree(files_beside(path), ignore_errors=True)


def files_beside(path: Any) -> Path:
    """The folder of what is too large for a checkpoint's file: `<checkpoint>.d`."""
    return Path(f"{path}.d")


def _attach_replay(checkpoint: dict[str, Any], target: Path) -> set[Path]:
    """Bring every rank's replay buffer beside the checkpoint; returns the files."""
    found = set()
    for rank, state in enumerate(checkpoint.get(SECTION, {}).get("ranks", ())):
        replay = state.get("data", {}).get("replay")
        if replay is not None:
            source, folder = Path(replay.pop("folder")), files_beside(target) / f"rank_{rank}"
            attach(replay["files"], source, folder)
            found |= {folder / name for name in replay["files"]}
    return found


def _remove_others(target: Path, keep: set[Path]) -> None:
    """Remove what an earlier checkpoint of the same name had beside it."""
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
    if isinstance(value, Tensor):
        return
    if isinstance(value, dict):
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


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
