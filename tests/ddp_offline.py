"""Recorded data on two ranks. Started by test_ddp.py: `<folder> memory|stream`.

The folder holds the data, and gets what each rank did. `memory` reads data.parquet, `stream` the files of data/ while
the ranks learn.
"""

import sys
from pathlib import Path

import torch
from helpers import quiet_trainer
from tensordict import TensorDict
from torch import Tensor

from lit_rl import DQN, OfflineDataModule
from lit_rl.replay import ray_blocks


class Watched(DQN):
    """Keeps which rows it is given, and has held-out rows say what they are."""

    def update(self, batch: TensorDict) -> dict:
        self.__dict__.setdefault("seen", []).append(batch["observation"][:, 0].clone())
        return super().update(batch)

    def judge(self, batch: TensorDict) -> dict[str, Tensor]:
        self.__dict__.setdefault("judged", []).append(batch["observation"][:, 0].clone())
        return {"row": batch["observation"][:, 0]}


def in_memory(folder: Path) -> None:
    columns = {"observation": ["row", "zero"], "action": "action", "reward": "reward", "truncated": "end"}
    data = OfflineDataModule(
        str(folder / "data.parquet"), columns=columns, max_updates=30, updates_per_batch=10, batches_per_epoch=1,
        batch_size=8, validation_fraction=0.3, seed=0,
    )  # fmt: skip
    algorithm, trainer = Watched(), quiet_trainer(devices=2, strategy="ddp")
    trainer.fit(algorithm, data)
    torch.save(
        {
            "weights": algorithm.state_dict(), "updates": algorithm.updates_done,
            "share": torch.from_numpy(data.feed().buffer.rows),
            "seen": torch.cat(algorithm.seen), "judged": torch.cat(algorithm.judged),
            "metrics": dict(trainer.callback_metrics),
        },
        folder / f"offline-{trainer.global_rank}.pt",
    )  # fmt: skip


def streamed(folder: Path) -> None:
    ray_blocks.PARTS = 8  # files that an execution of Ray Data reads, each in a task of its own
    columns = {"observation": ["row", "zero"], "action": "action", "reward": "reward", "terminated": "end"}
    data = OfflineDataModule(
        str(folder / "data"), columns=columns, streaming=True, shuffle_window=30, max_updates=30, updates_per_batch=5,
        batches_per_epoch=2, batch_size=8, seed=0,
    )  # fmt: skip
    algorithm, trainer = Watched(), quiet_trainer(devices=2, strategy="ddp")
    trainer.fit(algorithm, data)
    found = {"weights": algorithm.state_dict(), "updates": algorithm.updates_done, "seen": torch.cat(algorithm.seen)}
    torch.save(found, folder / f"streamed-{trainer.global_rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"memory": in_memory, "stream": streamed}[sys.argv[2]](Path(sys.argv[1]))
