"""Pictures of what a world model predicts, while it learns."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor

from lit_rl.errors import OptionError
from lit_rl.files import rescue
from lit_rl.options import Count, TakesOptions

MOST_NUMBERS = 8  # of a vector that are drawn
DRAWN_FROM = 64  # sequences, of which those in which no episode begins are drawn
FPS = 8


class Predictions(TakesOptions, L.Callback):
    """Draws what DreamerV3 predicts of replayed sequences of which it sees the first rows and then the actions alone.

    After the first evaluation and every so many after it, files are written into `predictions/` beside the run's log:
    numbers and the probabilities of classes, true and predicted, as `<env steps>.png`, images as `<env steps>.gif`, in
    which the true one, the predicted one and their difference lie below each other. A `WandbLogger` and a
    `TensorBoardLogger` are handed them. Training goes on as it would without. Only the first learner process draws.

    Args:
        every_n_evaluations: evaluations from one picture to the next.
        sequences: in a picture, side by side.
        context: rows that the model sees.

    Raises:
        OptionError: when made, if `lit-rl[plot]` or `lit-rl[video]` is not installed; before training, if the algorithm
            is not DreamerV3.
    """

    every_n_evaluations: int
    sequences: int
    context: int

    def __init__(self, *, every_n_evaluations: Count = 10, sequences: Count = 4, context: Count = 5):
        super().__init__()
        self.take_options()
        for module, extra in (("matplotlib", "plot"), ("imageio", "video")):
            if importlib.util.find_spec(module) is None:
                raise OptionError(f"Predictions needs {module}: pip install 'lit-rl[{extra}]'.")
        self._evaluations = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not hasattr(pl_module, "open_loop"):
            raise OptionError(f"Predictions: expected DreamerV3, got {type(pl_module).__name__}. Leave it out.")
        length = pl_module.hparams.sequence_length
        if self.context >= length:
            raise OptionError(f"context={self.context}: expected less than sequence_length={length}.")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if self._evaluations % self.every_n_evaluations == 0:
            self._draw(trainer, pl_module)
        self._evaluations += 1

    def state_dict(self) -> dict[str, Any]:
        return {"evaluations": self._evaluations}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._evaluations = state_dict["evaluations"]

    def _draw(self, trainer: L.Trainer, algorithm: Any) -> None:
        folder = rescue.log_folder(trainer) / "predictions"  # every rank asks
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not trainer.is_global_zero or data.buffer is None or not data.buffer.can_draw:
            return
        env_steps = algorithm.env_steps_done
        batch = data.buffer.peek(DRAWN_FROM, np.random.default_rng(env_steps))
        best = batch["is_first"][:, 1:].sum(1).argsort(stable=True)[: self.sequences]
        compared = algorithm.open_loop(batch[best].to(algorithm.device), self.context)
        folder.mkdir(parents=True, exist_ok=True)
        curves = {path: pair for path, pair in compared.items() if pair[0].ndim == 3}
        images = [pair for pair in compared.values() if pair[0].ndim == 5]
        if curves:
            path = folder / f"{env_steps:09d}.png"
            draw_curves(curves, self.context, path)
            _hand_over(trainer, path, env_steps)
        if images:
            path = folder / f"{env_steps:09d}.gif"
            true, predicted = (torch.cat([each.cpu() for each in part], -2) for part in zip(*images))
            draw_images(true, predicted, self.context, path)
            _hand_over(trainer, path, env_steps)


def draw_curves(compared: Mapping[str, tuple[Tensor, Tensor]], context: int, path: Path) -> None:
    """Draw numbers of sequences, true and predicted, each [B, L, n]: a row for each number, a column for a sequence."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [
        (f"{name or 'observation'}[{i}]", true[..., i].cpu().numpy(), predicted[..., i].cpu().numpy())
        for name, (true, predicted) in compared.items()
        for i in range(true.shape[-1])
    ][:MOST_NUMBERS]
    num = len(rows[0][1])
    figure = Figure(figsize=(2.6 * num, 0.6 + 1.3 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever display there is
    for line, (name, true, predicted) in zip(figure.subplots(len(rows), num, squeeze=False, sharex=True), rows):
        line[0].set_ylabel(name, fontsize=8)
        for axes, its_true, its_predicted in zip(line, true, predicted):
            axes.plot(its_true, color="black", linewidth=1.0, label="true")
            axes.plot(its_predicted, color="tab:orange", linewidth=1.0, label="predicted")
            axes.axvline(context - 0.5, color="tab:gray", linestyle=":", linewidth=1.0)
            axes.tick_params(labelsize=6)
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=8,
        title=f"the model sees {context} rows, then the actions alone", title_fontsize=8,
    )  # fmt: skip
    figure.savefig(path, dpi=120)


def draw_images(true: Tensor, predicted: Tensor, context: int, path: Path) -> None:
    """Write an animation of images between 0 and 1, each [B, L, C, height, width]; a bar is red where none is seen."""
    import imageio.v2 as imageio

    error = (predicted - true + 1) / 2
    columns = torch.cat([true, predicted, error], -2).permute(1, 3, 0, 4, 2).flatten(2, 3)  # [L, 3 height, B width, C]
    if columns.shape[-1] not in (1, 3):  # stacked frames: the last one
        columns = columns[..., -1:]
    frames = (columns.expand(*columns.shape[:-1], 3) * 255).clamp(0, 255).to(torch.uint8).numpy()
    bar = np.zeros((len(frames), 4, *frames.shape[2:]), np.uint8)
    bar[:context, ..., 1], bar[context:, ..., 0] = 255, 255
    imageio.mimsave(path, list(np.concatenate([bar, frames], 1)), duration=1000 / FPS, loop=0)


def _hand_over(trainer: L.Trainer, path: Path, env_steps: int) -> None:
    """Give loggers that take pictures one."""
    key = "predictions"
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            picture: Any = wandb.Image(str(path)) if path.suffix == ".png" else wandb.Video(str(path), format="gif")
            metrics: dict[str, Any] = {key: picture, "env_steps": float(env_steps)}
            logger.log_metrics(metrics, step=env_steps)
        elif isinstance(logger, TensorBoardLogger):
            import imageio.v2 as imageio

            frames = np.stack(imageio.mimread(path) if path.suffix == ".gif" else [imageio.imread(path)])[..., :3]
            if path.suffix == ".gif":
                logger.experiment.add_video(key, torch.from_numpy(frames).permute(0, 3, 1, 2)[None], env_steps, fps=FPS)
            else:
                logger.experiment.add_image(key, frames[0], env_steps, dataformats="HWC")
