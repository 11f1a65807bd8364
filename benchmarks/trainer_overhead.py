"""What Lightning's Trainer adds to PPO's update: the same rollouts through `Trainer.fit` and in a bare loop.

    .venv/bin/python benchmarks/trainer_overhead.py

Interleaved rounds, minimum of each (the machine is noisy). The bare loop calls the same `PPO.update` with plain torch
in place of `optimize`, and logs nothing. The Trainer has its hooks, optimizer wrapper, metrics and a CSV logger.
"""

import logging
import tempfile
import time
import warnings

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from tensordict import TensorDict
from torch import Tensor, nn

from lit_rl import PPO, RolloutDataModule

ROUNDS, UPDATES = 12, 20


class BarePPO(PPO):
    """PPO without Lightning around its gradient steps."""

    def optimize(self, loss: Tensor, optimizer: object = None) -> bool:
        self.bare_optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters_list, self.max_grad_norm)
        self.bare_optimizer.step()
        return True


class Repeated(RolloutDataModule):
    """The same rollout again and again: nothing but the update is timed."""

    def start_rollout(self) -> None:
        if self._pool is None:
            super().start_rollout()
            self.kept = super().finish_rollout()

    def finish_rollout(self) -> TensorDict:
        return self.kept.clone()


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    bare_times, trainer_times = [], []
    for _ in range(ROUNDS):
        data = Repeated("CartPole-v1", rollouts_per_epoch=UPDATES, seed=0)
        with tempfile.TemporaryDirectory() as folder:
            trainer = L.Trainer(
                accelerator="cpu", max_epochs=1, logger=CSVLogger(folder), log_every_n_steps=1, default_root_dir=folder,
                enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
                limit_val_batches=0, callbacks=[Clock()],
            )  # fmt: skip
            trainer.fit(PPO(lr=2.5e-4, num_epochs=4, minibatch_size=256), data)
        trainer_times.append(trainer.callbacks[0].seconds / UPDATES)

        bare = BarePPO(lr=2.5e-4, num_epochs=4, minibatch_size=256, spec=data.spec.to_dict())
        bare.build(data.spec)
        bare.bare_optimizer = bare.configure_optimizers()
        bare.parameters_list = list(bare.parameters())
        started = time.perf_counter()
        for _ in range(UPDATES):
            bare.update(data.finish_rollout())
        bare_times.append((time.perf_counter() - started) / UPDATES)
    bare_ms, trainer_ms = 1e3 * min(bare_times), 1e3 * min(trainer_times)
    print("bare    ", " ".join(f"{1e3 * t:.1f}" for t in bare_times))
    print("trainer ", " ".join(f"{1e3 * t:.1f}" for t in trainer_times))
    print(f"update of 1024 rows, 16 minibatches: bare loop {bare_ms:.1f} ms, Trainer {trainer_ms:.1f} ms: ", end="")
    print(f"overhead {100 * (trainer_ms / bare_ms - 1):.0f} %")


class Clock(L.Callback):
    """Wall time from the start to the end of the training epoch."""

    def on_train_epoch_start(self, *_: object) -> None:
        self.started = time.perf_counter()

    def on_train_epoch_end(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self.started


if __name__ == "__main__":
    main()
