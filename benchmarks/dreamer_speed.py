"""Seconds per update of DreamerV3, in parts: 16 sequences of 64 rows, 15 imagined steps.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/dreamer_speed.py micro size1m

CPU time of this process, which a busy machine changes little, and wall time; the median of the updates. Several sizes
are timed in turns. `--walker` takes the spaces of dmc_walker_walk instead of CartPole's.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from tensordict import TensorDict

from lit_rl import DreamerV3
from lit_rl.modules.dreamer_v3 import SIZES
from lit_rl.spec import EnvSpec

SEQUENCES, LENGTH = 16, 64
CARTPOLE = EnvSpec("CartPole", spaces.Box(-np.inf, np.inf, (4,), np.float32), spaces.Discrete(2))
WALKER = EnvSpec("walker", spaces.Box(-1, 1, (24,), np.float32), spaces.Box(-1, 1, (6,), np.float32))


def minibatch(algorithm: DreamerV3) -> TensorDict:
    """Rows of noise, in which every fiftieth ends an episode."""
    rows, spec = (SEQUENCES, LENGTH), algorithm.policy.spec
    discrete = isinstance(spec.action_space, spaces.Discrete)
    is_last = torch.rand(rows) < 0.02
    state = {name: torch.from_numpy(x) for name, x in algorithm.policy.initial_state(SEQUENCES).items()}
    batch = {
        "observation": torch.randn(*rows, *(spec.observation_space.shape or ())),
        "previous_action": torch.randint(2, rows) if discrete else torch.randn(*rows, *(spec.action_space.shape or ())),
        "reward": torch.rand(rows), "is_first": is_last.roll(1, 1), "is_last": is_last, "is_terminal": is_last,
        "state": state,
    }  # fmt: skip
    return TensorDict(batch, [SEQUENCES])


def parts_of(algorithm: DreamerV3, optimizer: Any) -> Iterator[str]:
    """One update, as `DreamerV3.update` makes it; yields the name of each part when it is over."""
    batch = minibatch(algorithm)
    yield "minibatch"
    algorithm.draw_noise(batch)
    yield "noise"
    loss, _ = algorithm.loss(batch)
    yield "losses"
    optimizer.zero_grad()
    loss.backward()
    yield "backward"
    optimizer.step()
    algorithm.follow(algorithm.hp.slow_rate)
    yield "optimizer"


def world_model_alone(algorithm: DreamerV3) -> float:
    """CPU seconds of the world model's losses, which are a part of "losses"."""
    batch = minibatch(algorithm)
    algorithm.draw_noise(batch)
    started = time.process_time()
    algorithm.model.losses(algorithm.policy, batch, gamma=algorithm.gamma, free_bits=1.0)
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="+", choices=list(SIZES))
    parser.add_argument("--updates", type=int, default=10, help="of each size")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--walker", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    runs = {}
    for size in options.sizes:
        algorithm = DreamerV3(size=size, spec=(WALKER if options.walker else CARTPOLE).to_dict())
        algorithm.configure_model()
        runs[size] = algorithm, algorithm.configure_optimizers()
    cpu: dict[str, dict[str, list[float]]] = {size: {} for size in runs}
    wall: dict[str, list[float]] = {size: [] for size in runs}
    for update in range(options.updates + 1):
        for size, (algorithm, optimizer) in runs.items():
            before, started = time.process_time(), time.perf_counter()
            for name in parts_of(algorithm, optimizer):
                now = time.process_time()
                if update and name == "minibatch":
                    started = time.perf_counter()
                elif update:  # the first one warms up
                    cpu[size].setdefault(name, []).append(now - before)
                before = now
            if update:
                wall[size].append(time.perf_counter() - started)
                cpu[size].setdefault("(world model's losses)", []).append(world_model_alone(algorithm))
    for size in runs:
        parts = {name: statistics.median(seconds) for name, seconds in cpu[size].items()}
        total = sum(seconds for name, seconds in parts.items() if not name.startswith("("))
        print(f"{size}: {total:.3f} CPU s per update, {statistics.median(wall[size]):.3f} s of wall time")
        print("  " + ", ".join(f"{name} {seconds:.3f}" for name, seconds in parts.items()))


if __name__ == "__main__":
    main()
