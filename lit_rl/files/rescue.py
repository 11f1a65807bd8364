"""Files for a run that does not go on: the checkpoint it can be resumed from, the batch that broke it."""

from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensordict import TensorDict

MAX_BATCH_BYTES = 50 * 2**20


def save_checkpoint(trainer: L.Trainer, name: str) -> Path:
    """Write a checkpoint beside those of the first `ModelCheckpoint`, else beside the log; every rank calls it."""
    folders = [getattr(c, "dirpath", None) for c in trainer.checkpoint_callbacks if isinstance(c, Checkpoint)]
    path = Path(next(filter(None, folders), None) or log_folder(trainer)) / name
    trainer.save_checkpoint(path)
    return path


def is_of_a_callback(trainer: L.Trainer, path: Path) -> bool:
    """Whether a checkpoint's path is in the folder of a `ModelCheckpoint`: else the user chose it."""
    folders = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
    return path.resolve().parent in [Path(folder).resolve() for folder in folders if folder]


def save_batch(batch: TensorDict, path: Path) -> str:
    """Write a batch as nested dicts of tensors, unless it is too large; returns where it is, or why it is not there."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in batch.values(True, True))
    if size > MAX_BATCH_BYTES:
        return f"not saved ({size >> 20} MB, more than {MAX_BATCH_BYTES >> 20})"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(batch.detach().cpu().clone().to_dict(), path)  # cloned: a view's file would hold all it is a view of
    return str(path)


def log_folder(trainer: L.Trainer) -> Path:
    """Where the run's files are, and no other run's; every rank calls it."""
    logger = next(iter(trainer.loggers), None)
    if logger is None or isinstance(logger, CSVLogger | TensorBoardLogger):
        return Path(trainer.log_dir or trainer.default_root_dir)
    # Of other loggers `trainer.log_dir` is what all their runs share: this is where ModelCheckpoint's folder is.
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    folder = Path(logger.save_dir or trainer.default_root_dir) / str(logger.name) / version
    return trainer.strategy.broadcast(folder)  # only the first rank's logger knows the run
