"""Hands metrics to loggers, callbacks and the progress bar."""

import time
from collections.abc import Mapping
from typing import Any

import torch

RETURNS = ("rollout/return_mean", "eval/return_mean")
HELD_OUT = ("eval/log_prob", "eval/td_error")  # of recorded episodes
SPEEDS = ("time/env_steps_per_s", "time/updates_per_s")


def telling(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The few that say how good a run is: returns, else what held-out episodes say, else the losses."""
    for names in (RETURNS, HELD_OUT, [name for name in metrics if name.startswith("loss/")]):
        found = {name: float(metrics[name]) for name in names if name in metrics}
        if found:
            return found
    return {}


class Reporter:
    """Publishes a run's metrics against its clock, and measures how long updates take.

    Not by `LightningModule.log`, which costs 0.45 ms per key: 15 % of a small PPO update.

    Args:
        trainer: whose loggers, callbacks and progress bar are told.
        clock: "env_steps" or "updates", the name under which they are told what time it is.
    """

    def __init__(self, trainer: Any, clock: str = "env_steps"):
        self._trainer, self._clock = trainer, clock
        self._unlogged: tuple[dict[str, float], int] | None = None  # the last update's metrics, and their step
        self._batch_ended = self._new_ended = time.perf_counter()  # any batch, and one in which the clock went on
        self._per_s = 0.0
        self._began, self._evaluation_began = self._batch_ended, 0.0
        self._spent = {"collecting": 0.0, "updating": 0.0, "evaluating": 0.0}  # seconds

    def begin_evaluation(self) -> None:
        """What follows is no training."""
        self._evaluation_began = time.perf_counter()

    def end_evaluation(self) -> None:
        """What followed `begin_evaluation` is over."""
        self._spent["evaluating"] += time.perf_counter() - self._evaluation_began

    def shares(self) -> dict[str, float]:
        """What the time since training began was spent on, 0 to 1. The rest is the Trainer's and the callbacks'."""
        passed = max(time.perf_counter() - self._began, 1e-9)
        return {name: seconds / passed for name, seconds in self._spent.items()}

    def resume_timing(self) -> None:
        """Training goes on now: what was before (evaluation, checkpoints) is not its time."""
        now = time.perf_counter()
        self._new_ended += now - self._batch_ended
        self._batch_ended = now

    def update(self, metrics: dict[str, Any], *, started: float, waited_s: float, step: int, new: int) -> None:
        """Publish a batch's metrics and timing.

        Args:
            metrics: of all ranks.
            started: when its update began, by `time.perf_counter`.
            waited_s: seconds of it that the learner waited for data.
            step: the clock after it, at which loggers are told.
            new: how far it went on in this batch.
        """
        ended = time.perf_counter()
        metrics["time/update_s"] = ended - started - waited_s
        if new:  # the time since the last ones, with what was learned from again meanwhile
            self._per_s = new / max(ended - self._new_ended, 1e-9)
            self._new_ended = ended
        metrics[f"time/{self._clock}_per_s"] = self._per_s
        self._batch_ended = ended
        self._spent["updating"] += metrics["time/update_s"]
        self._spent["collecting"] += metrics.get("time/sample_s", 0.0)
        metrics |= {f"time/{name}": share for name, share in self.shares().items()}
        trainer = self._trainer
        values = {name: float(value) for name, value in metrics.items()} | {self._clock: float(step)}
        self._tell(values)
        self._unlogged = values, step
        batches = trainer.fit_loop.total_batch_idx + 1
        if trainer.loggers and (batches % trainer.log_every_n_steps == 0 or trainer.should_stop):
            self.flush()

    def flush(self) -> None:
        """Hand the last update's metrics to the loggers if they have not got them, and have them written."""
        unlogged, self._unlogged = self._unlogged, None
        if unlogged is not None:
            self._log(*unlogged)

    def evaluation(self, values: dict[str, float], at: int) -> None:
        """Publish an evaluation's metrics at the time of the policy that played."""
        self._tell(values)
        self._log(values | {self._clock: float(at)}, at)

    def _tell(self, values: dict[str, float]) -> None:
        trainer = self._trainer
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
        trainer.progress_bar_metrics.update({name: values[name] for name in SPEEDS if name in values} | telling(values))

    def _log(self, values: dict[str, float], step: int) -> None:
        for logger in self._trainer.loggers:
            logger.log_metrics(values, step=step)
            logger.save()


def forget(trainer: Any, prefix: str) -> None:
    """Have `trainer.callback_metrics` no longer hold what has a name that begins like this."""
    for name in [name for name in trainer.callback_metrics if name.startswith(prefix)]:
        del trainer.callback_metrics[name]
