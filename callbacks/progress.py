"""A progress bar in env steps, or in updates where there is no environment."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from lit_rl.learner.reporting import SPEEDS, telling
from lit_rl.source import source_of


class EnvStepsProgressBar(TQDMProgressBar):
    """One bar for the whole run: env steps of `max_env_steps`, training return, evaluation return, env steps/s.

    Of recorded data: updates of `max_updates`, updates/s, and the evaluation return, or else what held-out episodes
    say, or else the losses.
    """

    LABELS = {
        "rollout/return_mean": "return",
        "eval/return_mean": "eval",
        "time/env_steps_per_s": "steps/s",
        "time/updates_per_s": "updates/s",
    }

    @property
    def train_description(self) -> str:
        return source_of(self.trainer).clock.replace("_", " ")

    def init_train_tqdm(self) -> Tqdm:
        bar = super().init_train_tqdm()
        bar.unit = " updates" if self.train_description == "updates" else " steps"
        bar.bar_format = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        bar.unit_scale = True
        return bar

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.train_progress_bar = self.init_train_tqdm()
        self.train_progress_bar.reset(source_of(trainer).budget)
        self._show(pl_module)

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """The bar spans epochs."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if self._should_update(int(pl_module.updates), 0):
            self._show(pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._show(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._show(pl_module)

    def _show(self, pl_module: Any) -> None:
        bar = self.train_progress_bar
        if bar.disable:
            return
        bar.n = pl_module.clock
        bar.set_postfix(self.get_metrics(pl_module.trainer, pl_module))

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, int | str | float | dict]:
        metrics = trainer.progress_bar_metrics
        shown = telling(metrics) | {name: float(metrics[name]) for name in SPEEDS if name in metrics}
        return {self.LABELS.get(name, name): f"{value:.4g}" for name, value in shown.items()}
