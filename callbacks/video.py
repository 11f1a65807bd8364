"""Videos of the policy while it learns."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import lightning as L
import numpy as np
from lightning.pytorch.loggers import WandbLogger

from lit_rl.envs.make import EnvConfig
from lit_rl.errors import EnvError, OptionError
from lit_rl.files import rescue
from lit_rl.options import Count, OneOf, TakesOptions
from lit_rl.viewing.playing import play_episodes
from lit_rl.viewing.video import check_format, check_renders

log = logging.getLogger(__name__)

Format = Annotated[str, OneOf("mp4", "gif")]


class Video(TakesOptions, L.Callback):
    """Records the greedy policy after the first evaluation, every so many after it, and at the end of the run.

    Files are `videos/<env steps>.mp4` beside the run's log. Episodes are those of the evaluation: the same seeds every
    time, in the environment of the evaluation. A `WandbLogger` is handed each file as `eval/video`. Needs no display.
    Only the first learner process records, while the others wait; training goes on as it would without. What goes wrong
    while it records, in the environment or on a full disk, costs that video and a warning.

    Args:
        every_n_evaluations: evaluations from one video to the next.
        episodes: whole episodes in one video; the last is cut after the datamodule's `evaluation.timeout_s`.
        format: "mp4" or "gif".

    Raises:
        OptionError: when made, if an option cannot be or `lit-rl[video]` is not installed; before training, if the
            environment renders no pictures.
    """

    every_n_evaluations: int
    episodes: int
    format: str

    def __init__(self, *, every_n_evaluations: Count = 10, episodes: Count = 1, format: Format = "mp4"):
        super().__init__()
        self.take_options()
        check_format("format", f"video.{format}")
        self._evaluations = 0
        self._recorded: int | None = None  # env steps of the newest video

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        env = getattr(trainer.datamodule, "eval_env", None)  # type: ignore[attr-defined]
        if not isinstance(env, EnvConfig):
            raise OptionError("Video: expected a datamodule with an environment, such as RolloutDataModule.")
        check_renders(env)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if self._evaluations % self.every_n_evaluations == 0:
            self._record(trainer, pl_module)
        self._evaluations += 1

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self._recorded != pl_module.env_steps_done:
            self._record(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"evaluations": self._evaluations, "recorded": self._recorded}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._evaluations, self._recorded = state_dict["evaluations"], state_dict["recorded"]

    def _record(self, trainer: L.Trainer, algorithm: Any) -> None:
        env_steps = self._recorded = algorithm.env_steps_done
        folder = rescue.log_folder(trainer)  # every rank asks
        if not trainer.is_global_zero:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        path = folder / "videos" / f"{env_steps:09d}.{self.format}"
        seeds = [data.eval_seed(episode) for episode in range(self.episodes)]
        policy = algorithm.policy.acting_copy()
        policy.rng = np.random.default_rng(seeds)
        try:
            returns = [
                episode.return_
                for episode in play_episodes(
                    data.eval_env, policy, seeds, video=path, timeout_s=data.evaluation.timeout_s
                )
            ]
        except (EnvError, OptionError) as error:
            log.warning("No video after %d env steps: %s", env_steps, error)
            return
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                _hand_over(logger, path, env_steps, float(np.mean(returns)))


def _hand_over(logger: WandbLogger, path: Path, env_steps: int, return_mean: float) -> None:
    import wandb

    format_: Any = path.suffix.removeprefix(".")
    video = wandb.Video(str(path), caption=f"return {return_mean:g}", format=format_)
    metrics: dict[str, Any] = {"eval/video": video, "env_steps": float(env_steps)}
    logger.log_metrics(metrics, step=env_steps)
