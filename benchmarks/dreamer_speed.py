"""Seconds per update of DreamerV3, in parts: 16 sequences of 64 rows, 15 imagined steps.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/dreamer_speed.py micro size1m

CPU time, which a busy machine changes less than wall time, and wall time; the median of the updates. `--walker` takes
the spaces of dmc_walker_walk instead of CartPole's. Other DreamerV3s update in turns with ours:

    ... size1m --rival r2dreamer=CLONE --rival sheeprl=CLONE --python VENV/bin/python --write
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from tensordict import TensorDict

from lit_rl import DreamerV3
from lit_rl.modules.dreamer_v3 import SIZES
from lit_rl.spec import EnvSpec

SEQUENCES, LENGTH = 16, 64
RESULTS = Path(__file__).parents[1] / "docs/results/dreamer_speed.json"
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


class Rival:
    """Another DreamerV3 in a process of its own, which updates when it is told to: see `dreamer_rivals.py`."""

    def __init__(self, python: str, name: str, clone: str, size: str, threads: int):
        command = [python, str(Path(__file__).with_name("dreamer_rivals.py")), name, clone, size, str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.num_parameters = int(self._answer())

    def update(self) -> tuple[float, float]:
        """The wall time and CPU time of one update."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        wall, cpu = self._answer().split()
        return float(wall), float(cpu)

    def close(self) -> None:
        self._process.communicate()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


class Ours:
    """Updates of lit_rl's DreamerV3 of one size, the CPU time of whose parts is kept."""

    def __init__(self, size: str, spec: EnvSpec):
        self._algorithm = DreamerV3(size=size, spec=spec.to_dict())
        self._algorithm.configure_model()
        self._optimizer: Any = self._algorithm.configure_optimizers()
        self.num_parameters = sum(p.numel() for group in self._optimizer.param_groups for p in group["params"])
        self.parts: dict[str, list[float]] = {}

    def update(self) -> tuple[float, float]:
        """The wall time and CPU time of one update."""
        wall = cpu = 0.0
        before, started = time.process_time(), time.perf_counter()
        for name in parts_of(self._algorithm, self._optimizer):
            now = time.process_time()
            if name == "minibatch":
                started = time.perf_counter()
            else:
                self.parts.setdefault(name, []).append(now - before)
                cpu += now - before
            before = now
        wall = time.perf_counter() - started
        self.parts.setdefault("(world model's losses)", []).append(world_model_alone(self._algorithm))
        return wall, cpu

    def close(self) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="+", choices=list(SIZES))
    parser.add_argument("--updates", type=int, default=10, help="of each size")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--walker", action="store_true")
    parser.add_argument("--rival", action="append", default=[], metavar="NAME=CLONE", help="r2dreamer or sheeprl")
    parser.add_argument("--python", default=sys.executable, help="of the rivals' environment")
    parser.add_argument("--write", action="store_true", help=f"to {RESULTS}")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    for size in options.sizes:
        ours = Ours(size, WALKER if options.walker else CARTPOLE)
        runs: dict[str, Ours | Rival] = {"lit_rl": ours}
        for name, clone in (rival.split("=", 1) for rival in options.rival):
            runs[name] = Rival(options.python, name, clone, size, options.threads)
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        for _ in range(options.updates + 1):
            for name, run in runs.items():
                found[name].append(run.update())
        figures: dict[str, Any] = {}
        for name, run in runs.items():
            run.close()
            wall, cpu = (statistics.median(seconds) for seconds in zip(*found[name][1:]))  # the first one warms up
            ratios = [theirs[1] / own[1] for theirs, own in zip(found[name][1:], found["lit_rl"][1:])]
            figures[name] = {
                "parameters": run.num_parameters, "cpu_s": round(cpu, 4), "wall_s": round(wall, 4),
                "cpu_ratio": round(statistics.median(ratios), 2),
            }  # fmt: skip
            print(f"{size}, {options.threads} threads, {name}: {figures[name]}", flush=True)
        parts = {name: round(statistics.median(seconds[1:]), 4) for name, seconds in ours.parts.items()}
        print("  " + ", ".join(f"{name} {seconds:.3f}" for name, seconds in parts.items()), flush=True)
        if options.write:
            known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            known[f"{size}, {options.threads} threads"] = {
                "updates": options.updates, "load": round(os.getloadavg()[0], 1), "parts_cpu_s": parts, "runs": figures,
            }  # fmt: skip
            RESULTS.write_text(json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    main()
