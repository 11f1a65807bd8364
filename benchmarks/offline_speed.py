"""What recorded data costs: its first read beside pyarrow's own, and a minibatch beside indexing by hand.

    .venv/bin/python benchmarks/offline_speed.py

The data are a million rows in the spaces of HalfCheetah (17 and 6 numbers), in episodes of 1,000 steps, written as
`Record` writes them. Both are measured in turns, in CPU seconds of all threads; what is reported are the medians and
their ratio.

`read`: `read_recorded`, which also compares the SHA-256 of each file and checks each number, beside
`pyarrow.parquet.read_table` of the same files and columns.

`draw`: a minibatch of 256 transitions as `OfflineDataModule` draws it, beside the same rows of the same columns by
`index_select`, in a plain dict (`by_hand`) and in a TensorDict as algorithms take it (`by_hand_in_tensordict`).
"""

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from gymnasium import spaces
from measuring import write
from tensordict import TensorDict

from lit_rl.files.episode_folder import EpisodeFolder, TimeLine, WholeEpisode
from lit_rl.files.recorded import read_recorded
from lit_rl.recorded import Recorded
from lit_rl.replay.recorded_buffer import RecordedBuffer
from lit_rl.spec import EnvSpec

SPEC = EnvSpec("Speed", spaces.Box(-np.inf, np.inf, (17,), np.float32), spaces.Box(-1, 1, (6,), np.float32))
LENGTH, EPISODES_PER_FILE = 1_000, 100
COLUMNS = ["episode", "t", "observation", "action", "reward", "log_prob", "terminated", "truncated", "closing"]
DRAWS, BATCH_SIZE, GAMMA = 2_000, 256, 0.99


def record(folder: Path, num_rows: int) -> None:
    """Write episodes of random numbers."""
    rng, into = np.random.default_rng(0), EpisodeFolder(folder, SPEC)
    last = np.arange(LENGTH) == LENGTH - 1

    def episode(number: int) -> WholeEpisode:
        steps = {
            "observation": rng.normal(size=(LENGTH, 17)).astype(np.float32),
            "action": rng.uniform(-1, 1, (LENGTH, 6)).astype(np.float32),
            "reward": rng.normal(size=LENGTH),
            "terminated": last & (number % 2 == 0),
            "truncated": last & (number % 2 == 1),
            "log_prob": rng.normal(size=LENGTH).astype(np.float32),
        }
        final = {"observation": rng.normal(size=17).astype(np.float32)}
        return WholeEpisode([TimeLine(steps, final, False, 0)], (number,))

    for first in range(0, num_rows // LENGTH, EPISODES_PER_FILE):
        into.add([episode(number) for number in range(first, first + EPISODES_PER_FILE)])


def in_turns(rounds: int, **measured: Callable[[], Any]) -> dict[str, float]:
    """Median CPU seconds of several functions, which take turns; each is called once before."""
    found: dict[str, list[float]] = {name: [] for name in measured}
    for turn in range(rounds + 1):
        for name, function in measured.items():
            gc.collect()
            started = time.process_time()
            function()
            if turn:
                found[name].append(time.process_time() - started)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def read_speed(folder: Path, rounds: int) -> dict[str, Any]:
    def scan() -> None:
        for file in sorted(folder.glob("*.parquet")):
            pq.read_table(file, columns=COLUMNS)

    seconds = in_turns(rounds, read=lambda: read_recorded([str(folder)]), scan=scan)
    return {"cpu_s": _rounded(seconds), "ratio": round(seconds["read"] / seconds["scan"], 2), "bar": 3.0}


def draw_speed(recorded: Recorded, rounds: int) -> dict[str, Any]:
    buffer = RecordedBuffer(recorded, SPEC, seed=np.random.SeedSequence(0))
    rng, rows = np.random.default_rng(0), buffer.rows
    columns = {name: torch.from_numpy(recorded.columns[name]) for name in ("observation", "action")}
    columns |= {"reward": torch.from_numpy(recorded.reward), "terminated": torch.from_numpy(recorded.terminated)}
    keys = {"observation": "observation", "action": "action"}
    next_keys = {"reward": "reward", "terminated": "terminated"}

    def taken() -> dict[str, Any]:
        at = torch.from_numpy(rows[rng.integers(len(rows), size=BATCH_SIZE)])
        found: dict[str, Any] = {key: columns[name].index_select(0, at) for key, name in keys.items()}
        found |= {"index": at, "discount": torch.full((BATCH_SIZE,), GAMMA)}
        found["next"] = {key: columns[name].index_select(0, at) for key, name in next_keys.items()}
        found["next"]["observation"] = columns["observation"].index_select(0, at + 1)
        return found

    def times(function: Callable[[], Any]) -> Callable[[], None]:
        def repeated() -> None:
            for _ in range(DRAWS):
                function()

        return repeated

    seconds = in_turns(
        rounds,
        draw=times(lambda: buffer.sample(BATCH_SIZE, gamma=GAMMA)),
        by_hand=times(taken),
        by_hand_in_tensordict=times(lambda: TensorDict(taken(), [BATCH_SIZE])),
    )
    return {
        "cpu_us": {name: round(x / DRAWS * 1e6, 1) for name, x in seconds.items()},
        "ratio": round(seconds["draw"] / seconds["by_hand_in_tensordict"], 2),
        "ratio_to_plain_dict": round(seconds["draw"] / seconds["by_hand"], 2),
        "bar": 1.5,
    }


def _rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {name: round(x, 3) for name, x in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        record(folder, args.rows)
        found = {"rows": args.rows, "rounds": args.rounds, "read": read_speed(folder, args.rounds)}
        print(found["read"], flush=True)
        found["draw"] = draw_speed(read_recorded([str(folder)])[0], args.rounds)
        print(found["draw"], flush=True)
    write("offline_speed.json", found)


if __name__ == "__main__":
    main()
