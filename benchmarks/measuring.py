"""What benchmarks of asynchronous collection share: a quiet Trainer, a clock, figures written with their origin."""

import importlib.metadata
import json
import logging
import os
import platform
import shlex
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from results import OUT, commit


def quiet_trainer(*callbacks: L.Callback) -> L.Trainer:
    """A Trainer on the CPU that evaluates, logs, saves and says nothing."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    return L.Trainer(
        accelerator="cpu", devices=1, max_epochs=-1, limit_val_batches=0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks),
    )  # fmt: skip


class Clock(L.Callback):
    """Ends a run some seconds after its first batches were learned, so that no start of processes is timed.

    Args:
        seconds: that are timed.
        warm_up: batches before.
        metrics: of which the means over that time are wanted.

    Attributes:
        seconds: between the last batch before and the last one that is timed.
        cpu_seconds: those of this process alone, on all cores, in that time.
        updates, env_steps: in that time.
    """

    def __init__(self, seconds: float, warm_up: int = 1, metrics: Sequence[str] = ()):
        self._limit, self._warm_up = seconds, warm_up
        self._batches = 0
        self.seconds, self.cpu_seconds, self.updates, self.env_steps = 0.0, 0.0, 0, 0
        self._sums = dict.fromkeys(metrics, 0.0)

    def on_train_batch_end(self, trainer: L.Trainer, algorithm: Any, *_: object) -> None:
        self._batches += 1
        now, cpu, done = time.perf_counter(), time.process_time(), (algorithm.updates_done, algorithm.env_steps_done)
        if self._batches == self._warm_up:
            self._begun, self._cpu_begun, self._before = now, cpu, done
        if self._batches <= self._warm_up:
            return
        self.seconds, self.cpu_seconds = now - self._begun, cpu - self._cpu_begun
        self.updates, self.env_steps = (after - before for after, before in zip(done, self._before))
        for name in self._sums:
            self._sums[name] += float(trainer.callback_metrics[name])
        if self.seconds >= self._limit:
            trainer.should_stop = True

    @property
    def means(self) -> dict[str, float]:
        return {name: total / (self._batches - self._warm_up) for name, total in self._sums.items()}


def write(name: str, figures: dict[str, Any]) -> None:
    """Write figures to docs/results, after what made them and where."""
    origin = {
        "command": shlex.join([".venv/bin/python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "commit": commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "lightning", "ray", "gymnasium")},
    }
    (OUT / name).write_text(json.dumps(origin | figures, indent=1) + "\n")
