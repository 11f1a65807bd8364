"""What memory costs: PPO's update with LSTM and GRU against the feed-forward one of equal sizes, in turns.

    .venv/bin/python benchmarks/recurrent_cost.py

CartPole-v1, 8 environments x 128 steps, 4 epochs, minibatches of 256 rows, sequences of 16 steps, one torch thread.
Feed-forward: two layers of 64 each for policy and critic. With memory: a layer of 64 and a memory of 64, shared.
Prints the median seconds of `time/update_s` and its ratio to the feed-forward update within each round.
"""

import argparse
import functools
import logging
import statistics
import warnings
from typing import Any

import lightning as L

from lit_rl import MLP, PPO, GRUNetwork, LSTMNetwork, RolloutDataModule

LAYER = functools.partial(MLP, hidden_sizes=(64,))
NETWORKS: dict[str, Any] = {
    "feed-forward": None,
    "LSTM": functools.partial(LSTMNetwork, hidden_size=64, encoder=LAYER),
    "GRU": functools.partial(GRUNetwork, hidden_size=64, encoder=LAYER),
}


class UpdateTimes(L.Callback):
    """Keeps `time/update_s` of every update but the first two."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if pl_module.updates_done > 2:
            self.seconds.append(float(trainer.callback_metrics["time/update_s"]))


def update_s(network: Any, num_updates: int) -> float:
    """The median time of an update."""
    times = UpdateTimes()
    data = RolloutDataModule("CartPole-v1", max_env_steps=1024 * num_updates, seed=1, torch_threads=1)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, callbacks=[times],
    )  # fmt: skip
    trainer.fit(
        PPO(network=network, sequence_length=16, num_epochs=4, minibatch_size=256, normalize_returns=False), data
    )
    return statistics.median(times.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=20)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rounds = [{name: update_s(network, args.updates) for name, network in NETWORKS.items()} for _ in range(args.rounds)]
    for name in NETWORKS:
        ratios = [times[name] / times["feed-forward"] for times in rounds]
        each = " ".join(f"{ratio:.2f}" for ratio in ratios)
        median_ms = 1000 * statistics.median(times[name] for times in rounds)
        print(f"{name:13s} {median_ms:6.1f} ms  {statistics.median(ratios):.2f} ({each})")


if __name__ == "__main__":
    main()
