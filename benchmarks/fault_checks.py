"""What the checks of env steps cost: a runner's env steps/s with them and without, in turns.

    .venv/bin/python benchmarks/fault_checks.py

Sixteen CartPoles in one runner, fragments of 64 steps, one thread; the median ratio of rounds in which both ran. The
checks: types and shapes of each step's result, finite numbers, the limits of time (an alarm of the kernel for each
step) and the heartbeat, the ledger, and the actions kept for an exact resume.
"""

import argparse
import signal
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lit_rl import EnvRunner, FaultTolerance, Policy
from lit_rl.envs.make import EnvConfig
from lit_rl.runners.faults import Heartbeat, Watchdog
from lit_rl.runners.ledger import Entry

NUM_ENVS, LENGTH, FRAGMENTS = 16, 64, 8


class Unchecked(EnvRunner):
    """Without the checks that come once per fragment."""

    def _check_finite(self, view: dict[str, np.ndarray]) -> None:
        """Nothing is looked at."""


def make(checked: bool, folder: Path) -> EnvRunner:
    env = EnvConfig("CartPole-v1")
    torch.manual_seed(0)
    policy, seed = Policy(env.spec()), np.random.SeedSequence(0)
    options: dict[str, Any] = {"num_envs": NUM_ENVS, "rollout_length": LENGTH, "seed": seed}
    if checked:
        watchdog = Watchdog(FaultTolerance(), Heartbeat.create(folder / "beat"))
        return EnvRunner(env, policy, watchdog=watchdog, replayable=True, **options)
    runner = Unchecked(env, policy, **options)
    runner._envs.checks = False
    return runner


def env_steps_per_s(runner: EnvRunner) -> float:
    started = time.perf_counter()
    for _ in range(FRAGMENTS):
        entry: Entry = runner.sample().entry
        assert entry.delivered == NUM_ENVS * LENGTH
    return FRAGMENTS * LENGTH * NUM_ENVS / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runners = {checked: make(checked, Path(folder)) for checked in (True, False)}
        ratios, speeds = [], []
        for number in range(args.rounds + 2):
            order = (True, False) if number % 2 else (False, True)
            found = {checked: env_steps_per_s(runners[checked]) for checked in order}
            if number >= 2:
                ratios.append(found[True] / found[False])
                speeds.append(found[True])
        signal.setitimer(signal.ITIMER_REAL, 0)
    low, middle, high = (float(np.quantile(ratios, q)) for q in (0.25, 0.5, 0.75))
    print(f"with checks {statistics.median(speeds):.0f} env steps/s, {middle:.3f} of without ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
