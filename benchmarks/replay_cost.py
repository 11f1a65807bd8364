"""What drawing from the replay buffer costs, against indexing the same tensors by hand, and what a row takes.

    .venv/bin/python benchmarks/replay_cost.py

A million transitions of 17-float observations and 6-float actions; minibatches of 256, on one thread. By hand means:
random rows, then observation, next observation, action, reward and terminated at these rows. The three are timed in
turns; the median of the rounds counts.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import statistics
import time
from collections.abc import Callable

import numpy as np
import psutil
import torch
from gymnasium import spaces

from lit_rl.replay import ReplayBuffer
from lit_rl.spec import EnvSpec

ROWS, BATCH, LENGTH = 1_000_000, 256, 1000
SPEC = EnvSpec("Benchmark", spaces.Box(-1, 1, (17,), np.float32), spaces.Box(-1, 1, (6,), np.float32))


def fill(buffer: ReplayBuffer) -> None:
    """Episodes of `LENGTH` steps, cut by a time limit."""
    rng = np.random.default_rng(0)
    is_init = np.zeros((1, LENGTH), np.bool_)
    is_init[0, 0] = True
    for _ in range(ROWS // (LENGTH + 1)):
        buffer.extend(
            {
                "observation": rng.random((1, LENGTH, 17), np.float32), "reward": rng.random((1, LENGTH), np.float32),
                "action": rng.random((1, LENGTH, 6), np.float32), "last_observation": rng.random((1, 17), np.float32),
                "terminated": np.zeros((1, LENGTH), np.bool_), "truncated": np.roll(is_init, -1, 1), "is_init": is_init,
                "final_step": np.array([[LENGTH - 1]]), "final_observation": rng.random((1, 1, 17), np.float32),
            },
            [0],
        )  # fmt: skip


def by_hand(columns: dict[str, torch.Tensor]) -> Callable[[], object]:
    def draw() -> object:
        index = torch.randint(ROWS, (BATCH,))
        return [column[index] for column in columns.values()]

    return draw


def main() -> None:
    torch.set_num_threads(1)
    before = psutil.Process().memory_info().rss
    uniform = ReplayBuffer(SPEC, ROWS)
    fill(uniform)
    print(f"{len(uniform):,} transitions: {(psutil.Process().memory_info().rss - before) / 1e6:.0f} MB resident")
    prioritized = ReplayBuffer(SPEC, ROWS, priority_alpha=0.6)
    fill(prioritized)
    for _ in range(500):
        index = prioritized.sample(BATCH)["index"]
        prioritized.update_priorities(index, torch.rand(BATCH))
    columns = {
        "observation": torch.rand(ROWS, 17), "next_observation": torch.rand(ROWS, 17), "action": torch.rand(ROWS, 6),
        "reward": torch.rand(ROWS), "terminated": torch.zeros(ROWS, dtype=torch.bool),
    }  # fmt: skip
    draws = {
        "by hand": by_hand(columns),
        "uniform": lambda: uniform.sample(BATCH, gamma=0.99),
        "prioritized": lambda: prioritized.sample(BATCH, gamma=0.99, beta=0.4),
    }
    times: dict[str, list[float]] = {name: [] for name in draws}
    for _ in range(40):
        for name, draw in draws.items():
            started = time.perf_counter()
            for _ in range(50):
                draw()
            times[name].append((time.perf_counter() - started) / 50)
    hand = statistics.median(times["by hand"])
    for name, seconds in times.items():
        print(
            f"{name}: {statistics.median(seconds) * 1e6:.0f} us, {statistics.median(seconds) / hand:.2f} times by hand"
        )


if __name__ == "__main__":
    main()
