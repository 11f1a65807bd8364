"""How fast recorded episodes stream, beside Ray Data's own reading of the same files, and whether memory stays flat.

    .venv/bin/python benchmarks/streaming.py --gigabytes 4 --seconds 120

Writes episodes of 17-float observations and 6-float actions into Parquet files, of so many bytes as rows in memory, and
reads them with a memory limit of a tenth of that, in turns:

    plain      `ray.data.read_parquet(files).iter_batches(batch_size=256, batch_format="numpy")`
    streamed   minibatches of 256 transitions, as `OfflineDataModule(streaming=True)` gives them to an algorithm

Rates are those after the first batch. Memory is that of this process and of its processes of Ray, without what they
share (USS), sampled each second: the greatest in each quarter of the time. The figures are in
docs/results/streaming.json.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import itertools
import logging
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import torch
from gymnasium import spaces
from measuring import write

from lit_rl.distributions import distribution_for
from lit_rl.files.data_files import open_files, size_of
from lit_rl.files.episode_folder import EpisodeFolder, TimeLine, WholeEpisode
from lit_rl.replay.ray_blocks import Shares
from lit_rl.replay.recorded_feed import Draws
from lit_rl.replay.streamed_feed import StreamedFeed
from lit_rl.runners import ray_session
from lit_rl.runners.ray_session import OWNER
from lit_rl.spec import EnvSpec

LENGTH, BATCH, WINDOW = 1000, 256, 100_000
SPEC = EnvSpec("Benchmark", spaces.Box(-np.inf, np.inf, (17,), np.float32), spaces.Box(-1, 1, (6,), np.float32))
ROW = 17 * 4 + 6 * 4 + 8 + 4 + 8 + 4 + 8 + 4  # bytes, without flags


def make_files(folder: Path, num_bytes: float, num_files: int) -> None:
    """Episodes of `LENGTH` steps, cut by a time limit."""
    rng, out = np.random.default_rng(0), EpisodeFolder(folder, SPEC)
    truncated = np.arange(LENGTH) == LENGTH - 1
    per_file = max(1, round(num_bytes / ROW / LENGTH / num_files))
    for number in range(num_files):
        episodes = []
        for episode in range(per_file):
            steps = {
                "observation": rng.random((LENGTH, 17), np.float32), "action": rng.random((LENGTH, 6), np.float32),
                "reward": rng.random(LENGTH), "terminated": np.zeros(LENGTH, np.bool_), "truncated": truncated,
                "log_prob": rng.random(LENGTH, np.float32),
            }  # fmt: skip
            line = TimeLine(steps, {"observation": rng.random(17, np.float32)}, False, 0)
            episodes.append(WholeEpisode([line], [number, episode]))
        out.add(episodes)


def plain(folder: Path) -> Iterator[int]:
    """Rows of one batch after the other, by Ray Data alone."""
    import ray.data

    while True:
        for batch in ray.data.read_parquet(str(folder)).iter_batches(batch_size=BATCH, batch_format="numpy"):
            yield len(batch["reward"])


def streamed(folder: Path, memory_limit: int) -> Iterator[int]:
    """Transitions of one minibatch after the other."""
    policy = SimpleNamespace(spec=SPEC, distribution=distribution_for(SPEC.action_space), has_memory=False)
    algorithm: Any = SimpleNamespace(
        policy=policy, sequence_length=None, gamma=0.99, wants_returns_to_go=False, device=torch.device("cpu")
    )
    files = open_files([file for file, _ in size_of([str(folder)], are_tables=False)])
    feed = StreamedFeed(
        algorithm,
        files,
        draws=Draws(BATCH, (1, 1), None),
        shuffle_window=WINDOW,
        memory_limit=memory_limit,
        shares=Shares(len(files), np.random.SeedSequence(0)),
    )
    try:
        while True:
            yield len(feed.draw(0.0))
    finally:
        feed.close()


class Memory(threading.Thread):
    """Samples memory each second until it is told to stop."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.learner: list[float] = []  # MB
        self.workers: list[float] = []
        self._over = threading.Event()

    def run(self) -> None:
        me = psutil.Process()
        mine = f"{me.pid}-"  # of several Rays on this machine
        while not self._over.wait(1.0):
            self.learner.append(me.memory_full_info().uss / 1e6)
            total = 0.0
            for process in psutil.process_iter(["name"]):
                try:
                    if process.info["name"].startswith("ray::") and process.environ().get(OWNER, "").startswith(mine):
                        total += process.memory_full_info().uss / 1e6
                except psutil.Error:
                    continue
            self.workers.append(total)

    def stop(self) -> dict[str, Any]:
        """What was sampled: the greatest of each quarter of the time, in MB."""
        self._over.set()
        self.join()
        return {"learner_mb": _quarters(self.learner), "workers_mb": _quarters(self.workers)}


def _quarters(samples: list[float]) -> list[int]:
    return [round(max(part)) for part in np.array_split(samples, 4) if len(part)]


def rate(batches: Iterator[int], seconds: float) -> float:
    """Rows per second after the first batch."""
    next(batches)
    begun, rows = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        rows += sum(itertools.islice(batches, 16))
    found = rows / (time.perf_counter() - begun)
    batches.close()  # type: ignore[attr-defined]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=0.4, help="of rows; 4 in the figures of the documentation")
    parser.add_argument("--files", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each turn")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the files are or are written; None: a temporary one")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if not any(folder.glob("*.parquet")):
            make_files(folder, args.gigabytes * 1e9, args.files)
        num_bytes = sum(size for _, size in size_of([str(folder)], are_tables=False))
        print(f"{num_bytes / 1e9:.2f} GB in {args.files} files", flush=True)
        ray_session.connect()
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        rates: dict[str, list[float]] = {"plain": [], "streamed": []}
        memory: list[dict[str, Any]] = []
        for _ in range(args.rounds):
            rates["plain"].append(rate(plain(folder), args.seconds))
            sampler = Memory()
            sampler.start()
            rates["streamed"].append(rate(streamed(folder, num_bytes // 10), args.seconds))
            memory.append(sampler.stop())
            print({name: f"{found[-1]:,.0f} rows/s" for name, found in rates.items()}, memory[-1], flush=True)
    medians = {name: statistics.median(found) for name, found in rates.items()}
    write(
        "streaming.json",
        {
            "gigabytes": num_bytes / 1e9, "memory_limit_gigabytes": num_bytes / 1e10, "files": args.files,
            "rows_per_s": rates, "median_rows_per_s": medians,
            "ratio": medians["streamed"] / medians["plain"], "memory": memory,
        },
    )  # fmt: skip
    print(f"{medians['streamed'] / medians['plain']:.2f} times as fast as plain reading")


if __name__ == "__main__":
    main()
