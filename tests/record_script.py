"""Runs that record: `python record_script.py ranks` on two ranks, `... killed <seed> <times>` killed so often."""

import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from helpers import quiet_trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_rl import PPO, Evaluation, Record, RolloutDataModule
from lit_rl.files import episodes


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


def killed(seed: int, times: int) -> None:
    """Kills a run that goes on from its checkpoint: after a new shard came, or while one is written.

    All processes are forks of this one, which has imported what takes long.
    """
    rng, folder = random.Random(seed), Path("data")
    for _ in range(times):
        wanted = len(list(folder.glob("*.parquet"))) + 1 + rng.randrange(3)
        writing, child = rng.random() < 0.5, fork(alone)
        while not os.waitpid(child, os.WNOHANG)[0]:
            there = len(list(folder.glob("*.parquet")))
            if there >= wanted and (not writing or list(folder.glob(".*.tmp"))):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                break
            time.sleep(0.0005)
        else:
            sys.exit("the run ended by itself")
        if os.waitpid(fork(check), 0)[1]:
            sys.exit("the files are not whole, or an episode is there twice")


def fork(function: Callable[[], None]) -> int:
    """Run a function in another process; returns its id."""
    child = os.fork()
    if child:
        return child
    try:
        function()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def check() -> None:
    """All that is there is whole, and there once: no two episodes of CartPole are alike."""
    rows = episodes.read_rows(episodes.find(["data"]), ["policy_version"])
    parts = [rows.columns[name] for name in ("observation", "action", "reward", "log_prob", "policy_version")]
    found = Counter(
        b"".join(np.ascontiguousarray(part[begin:end]).tobytes() for part in parts)
        for begin, end in zip(rows.begins[:-1], rows.begins[1:])
    )
    assert set(found.values()) == {1}
    numbers = rows.columns["episode"][rows.begins[:-1]].tolist()
    assert len(set(numbers)) == len(numbers)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "ranks":
        ranks()
    else:
        killed(int(sys.argv[2]), int(sys.argv[3]))
