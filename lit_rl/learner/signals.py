"""Ending a run on SIGTERM, SIGINT or SIGUSR1: after the running batch, with a checkpoint."""

import logging
import os
import signal
import sys
import threading
import time
from types import FrameType

import lightning as L
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment

from lit_rl import distributed
from lit_rl.files.rescue import save_checkpoint

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ONE = 0.2  # seconds: a signal that comes again so soon is the same one, sent to the process and to its group


class Interruption:
    """Takes the place of the signal handlers until `Trainer.fit` ends; Lightning then puts the earlier ones back.

    The first signal is noted, and obeyed by all ranks at their next `obey`. A second one ends the process at once.
    Left alone are Lightning's handlers if they have SLURM queue the job again, Ctrl-C in an interactive session, and a
    program's own handler of SIGUSR1.

    Args:
        trainer: that has begun to fit.
    """

    def __init__(self, trainer: L.Trainer):
        self._trainer = trainer
        # Lightning's handler may have taken one already.
        self._number, self._received = signal.SIGTERM if trainer.received_sigterm else 0, 0.0
        self._environment = trainer._accelerator_connector.cluster_environment
        requeues = isinstance(self._environment, SLURMEnvironment) and self._environment.auto_requeue
        if requeues or threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            interactive = number == signal.SIGINT and hasattr(sys, "ps1")
            taken = number == signal.SIGUSR1 and signal.getsignal(number) is not signal.SIG_DFL
            if not (interactive or taken):
                signal.signal(number, self._receive)

    def obey(self) -> None:
        """If any rank was signalled, save a checkpoint and leave the program; between batches, on every rank."""
        (number,) = distributed.greatest([self._number], self._trainer.strategy.root_device)
        if not number:
            return
        path = save_checkpoint(self._trainer, "interrupted.ckpt")
        if self._trainer.is_global_zero:
            log.warning("%s: training was stopped. To go on: ckpt_path=%s", signal.Signals(number).name, path)
        # Lightning kills the first rank when one that it started itself ends with anything but 0.
        started_by_first = isinstance(self._environment, LightningEnvironment) and self._trainer.local_rank > 0
        sys.exit(0 if started_by_first else 128 + number)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._number:
            self._number, self._received = number, now
            if self._trainer.is_global_zero:  # not by print, which may be what was interrupted
                name = signal.Signals(number).name
                os.write(2, f"\n{name}: stopping after this batch; once more stops at once.\n".encode())
        elif number != self._number or now - self._received > ONE:
            launcher = self._trainer.strategy.launcher
            if launcher is not None:
                launcher.kill(signal.SIGKILL)
            os._exit(128 + number)
