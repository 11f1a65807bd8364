"""As many env runners as the learner can use."""

import logging
from typing import Any

import lightning as L
import torch

from lit_rl import distributed
from lit_rl.errors import OptionError
from lit_rl.options import Count, TakesOptions, UnitInterval

log = logging.getLogger(__name__)


class ScaleEnvRunners(TakesOptions, L.Callback):
    """Adds an env runner while the learner waits for env steps, and takes one away while they would wait for it.

    Looks at which share of their time all learner processes waited over the last `every_n_batches` batches. On-policy
    rollouts grow and shrink with the number of runners, and so do the minibatches per update.

    Args:
        min_env_runners: the fewest per learner process.
        max_env_runners: the most per learner process.
        every_n_batches: Lightning batches between two looks.
        add_above: waiting share above which a runner is added.
        remove_below: waiting share below which one is taken away.
    """

    min_env_runners: int
    max_env_runners: int
    every_n_batches: int
    add_above: float
    remove_below: float

    def __init__(
        self,
        *,
        min_env_runners: Count = 1,
        max_env_runners: Count = 8,
        every_n_batches: Count = 20,
        add_above: UnitInterval = 0.6,
        remove_below: UnitInterval = 0.1,
    ):
        super().__init__()
        self.take_options()
        if max_env_runners < min_env_runners:
            raise OptionError(
                f"max_env_runners={max_env_runners}: expected a whole number of at least {min_env_runners}."
            )
        if remove_below >= add_above:
            raise OptionError(f"remove_below={remove_below}: expected less than add_above={add_above}.")
        self._waited = self._worked = 0.0
        self._batches = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not getattr(trainer.datamodule, "num_env_runners", 0):  # type: ignore[attr-defined]
            raise OptionError("ScaleEnvRunners: expected a datamodule with num_env_runners of at least 1.")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        metrics = trainer.callback_metrics
        self._waited += float(metrics["time/sample_s"])
        self._worked += float(metrics["time/update_s"])
        self._batches += 1
        if self._batches < self.every_n_batches:
            return
        times = torch.tensor([self._waited, self._worked], device=pl_module.device)
        waited, worked = distributed.rank_mean(times).tolist()  # so that all ranks decide alike
        share = waited / max(waited + worked, 1e-9)
        self._waited, self._worked, self._batches = 0.0, 0.0, 0
        data = trainer.datamodule  # type: ignore[attr-defined]
        wanted = data.num_env_runners + (share > self.add_above) - (share < self.remove_below)
        wanted = min(max(wanted, self.min_env_runners), self.max_env_runners)
        if wanted != data.num_env_runners:
            log.info("The learner waited %.0f %% of its time: %d env runners from now on.", 100 * share, wanted)
            data.resize(wanted)
