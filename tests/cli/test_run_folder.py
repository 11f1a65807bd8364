"""Every run has a folder of its own, whatever its logger."""

from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.loggers import Logger

from lit_rl import cli

TINY = [
    "fit", "--config", "ppo_cartpole", "--data.max_env_steps", "256", "--data.rollout_length", "16",
    "--data.rollouts_per_epoch", "2", "--data.evaluation.episodes", "1", "--model.num_epochs", "1",
    "--model.minibatch_size", "64",    "--trainer.enable_progress_bar", "false",
]  # fmt: skip


class ProjectLogger(Logger):
    """Like `WandbLogger`: all runs share `save_dir`, and each has an id."""

    runs = 0

    def __init__(self) -> None:
        super().__init__()
        type(self).runs += 1
        self._version = f"id{self.runs}"

    save_dir = property(lambda self: "runs")
    name = property(lambda self: "project")
    version = property(lambda self: self._version)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Nothing is written."""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing is written."""


def test_runs_of_one_project_keep_their_configs_and_episodes_apart(monkeypatch) -> None:
    monkeypatch.setattr(ProjectLogger, "runs", 0)
    logger = ["--trainer.logger", "test_run_folder.ProjectLogger"]
    for seed in (1, 2):
        cli.main([*TINY, *logger, "--seed_everything", str(seed)])
        found = yaml.safe_load(Path(f"runs/project/id{seed}/config.yaml").read_text())
        assert found["seed_everything"] == seed
        assert Path(f"runs/project/id{seed}/checkpoints/last.ckpt").exists()
    assert sorted(path.parts[2] for path in Path("runs").rglob("config.yaml")) == ["id1", "id2"]

    cli.main(["predict", *TINY[1:], *logger, "--ckpt_path", "runs/project/id2/checkpoints/last.ckpt"])
    assert [path.parts[2] for path in Path("runs").rglob("*.parquet")] == ["id3"]
