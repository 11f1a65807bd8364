"""A run that records: `python record_script.py ranks` on two ranks, `... alone <lock>` until it is killed."""

import sys
from pathlib import Path

import torch
from helpers import quiet_trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_rl import PPO, Evaluation, Record, RolloutDataModule


def data(max_env_steps: int) -> RolloutDataModule:
    return RolloutDataModule(
        "CartPole-v1", num_envs_per_env_runner=4, rollout_length=32, max_env_steps=max_env_steps, seed=3,
        rollouts_per_epoch=2, evaluation=Evaluation(episodes=3),
    )  # fmt: skip


def ranks() -> None:
    """Two ranks record their training's and evaluations' episodes, then what they predict, in one folder."""
    trainer = quiet_trainer(
        devices=2, strategy="ddp", callbacks=[Record("data", training=True, rows_per_file=200)], max_steps=-1
    )
    algorithm = PPO(minibatch_size=64, num_epochs=1)
    source = data(256 * 6)
    trainer.fit(algorithm, source)
    source.evaluation = Evaluation(episodes=5, deterministic=False)
    trainer.predict(algorithm, source)


def alone() -> None:
    """Goes on from the last checkpoint, if there is one, and records until it is killed."""
    checkpoints = ModelCheckpoint("checkpoints", save_last=True, save_top_k=0, every_n_epochs=2)
    record = Record("data", training=True, rows_per_file=300)
    trainer = quiet_trainer(
        callbacks=[checkpoints, record], enable_checkpointing=True, max_epochs=100_000, limit_val_batches=1.0
    )
    last = Path("checkpoints/last.ckpt")
    trainer.fit(PPO(minibatch_size=64, num_epochs=1), data(10**9), ckpt_path=last if last.exists() else None)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"ranks": ranks, "alone": alone}[sys.argv[1]]()
