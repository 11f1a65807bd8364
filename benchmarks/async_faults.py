"""Two long runs with free-running env runners: one whose runners are killed, and one whose memory is watched.

    .venv/bin/python benchmarks/async_faults.py killed --write
    .venv/bin/python benchmarks/async_faults.py memory --minutes 10 --write

"killed": IMPALA on CartPole-v1 as in recipes/impala_cartpole.yaml, 1,000,000 env steps with two runners, one of which
is killed ten times, at equal distances. Passes if the ledger accounts for each env step once and the last policy's
greedy return over 100 episodes is 450 or more. About 2 minutes on two idle cores.

"memory": IMPALA on a CartPole that sleeps in each step, ten times as long in one runner as in the other. Passes if the
resident memory of the learner process grows by less than 1 MB a minute after the second minute (a straight line through
samples of every second), if both runners' rows were learned from, and if the ledger accounts for each env step.
"""

import argparse
import contextlib
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import lightning as L
import numpy as np
import psutil
import torch
import yaml
from measuring import quiet_trainer, write
from results import ROOT

from lit_rl import IMPALA, FaultTolerance, RolloutDataModule
from lit_rl.evaluation.episodes import play

BAR, MOST_GROWTH = 450.0, 1.0  # greedy return; MB a minute
WARM_UP_S, SAMPLE_S = 120.0, 1.0  # of memory: before it is judged, and between samples
STEP_S, SLOWER = 0.001, 10  # of an env step; of the slow runner
SIZE: dict[str, Any] = {"num_env_runners": 2, "num_envs_per_env_runner": 8, "rollout_length": 50, "torch_threads": 1}


class Dawdling(gym.Wrapper):
    """CartPole that sleeps in each step, in one process `SLOWER` times as long as in the others.

    Args:
        lock: a file that the slow process makes: the first that can, of those that did not make this datamodule.
        owner: the process id of the learner.
    """

    def __init__(self, lock: str, owner: int):
        super().__init__(gym.make("CartPole-v1"))
        self._seconds = STEP_S
        if os.getpid() != owner and _pid_in(lock) == os.getpid():
            self._seconds = STEP_S * SLOWER

    def step(self, action: Any) -> Any:
        time.sleep(self._seconds)
        return self.env.step(action)


def _pid_in(lock: str) -> int:
    """Of the process that made the file: this one, if there was none."""
    mine = f"{lock}.{os.getpid()}"
    Path(mine).write_text(str(os.getpid()))
    with contextlib.suppress(FileExistsError):
        os.link(mine, lock)
    return int(Path(lock).read_text())


class Kill(L.Callback):
    """Kills a runner's process at equal distances of a run of `env_steps`, `times` times."""

    def __init__(self, data: RolloutDataModule, times: int, env_steps: int, seed: int):
        self._data, self._rng = data, random.Random(seed)
        self._due = [env_steps * (i + 1) // (times + 1) for i in range(times)]
        self._victim: int | None = None
        self.killed = 0

    def on_train_batch_end(self, trainer: L.Trainer, algorithm: Any, *_: object) -> None:
        if self._victim is not None:
            time.sleep(self._rng.uniform(0, 0.03))  # somewhere in a fragment
            os.kill(self._victim, signal.SIGKILL)
            self._victim, self.killed = None, self.killed + 1
        elif self._due and algorithm.env_steps_done >= self._due[0]:
            # Runners say who they are between two fragments: kill one a batch later, when they collect again.
            pids = self._data._runners.pids()
            if pids:
                del self._due[0]
                self._victim = self._rng.choice(pids)


class Watch(L.Callback):
    """Samples the resident memory of this process, and ends the run after `minutes`."""

    def __init__(self, minutes: float):
        self._minutes = minutes
        self.samples: list[tuple[float, float]] = []  # minutes since the first batch, MB
        self._begun = 0.0

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        now = time.monotonic()
        self._begun = self._begun or now
        minute = (now - self._begun) / 60
        if not self.samples or minute - self.samples[-1][0] >= SAMPLE_S / 60:
            self.samples.append((minute, psutil.Process().memory_info().rss / 1e6))
        if minute >= self._minutes:
            trainer.should_stop = True


def growth(samples: list[tuple[float, float]], after: float) -> float:
    """MB a minute: the slope of a straight line through the samples after some minutes.

    >>> growth([(0.0, 100.0), (2.0, 200.0), (3.0, 201.0), (4.0, 202.0)], after=2.0)
    1.0
    """
    kept = np.array([sample for sample in samples if sample[0] >= after])
    return round(float(np.polyfit(kept[:, 0], kept[:, 1], 1)[0]), 3)


def is_exact(data: RolloutDataModule, algorithm: IMPALA) -> bool:
    """Whether each env step is accounted for once.

    The ledger itself raises where a fragment does not begin at the env step at which the last one of its runner ended.
    """
    ledger = data.ledger
    return ledger.delivered == algorithm.env_steps_done and ledger.executed == ledger.delivered + sum(
        ledger.discarded.values()
    )


def killed(times: int = 10, env_steps: int = 1_000_000, seed: int = 1, episodes: int = 100) -> dict[str, Any]:
    """See "killed" above."""
    recipe = yaml.safe_load((ROOT / "recipes" / "impala_cartpole.yaml").read_text())
    L.seed_everything(seed, verbose=False)
    data = RolloutDataModule(
        "CartPole-v1", prefetch=2, max_env_steps=env_steps, seed=seed,
        fault_tolerance=FaultTolerance(max_restarts=1_000), **SIZE,
    )  # fmt: skip
    algorithm, kill = IMPALA(**recipe["model"]["init_args"]), Kill(data, times, env_steps, seed)
    quiet_trainer(kill).fit(algorithm, data)
    seeds = np.random.SeedSequence([seed, 20_000]).generate_state(episodes).tolist()
    return_mean = statistics.mean(episode.return_ for episode in play(data.env, algorithm.policy, seeds))
    exact = is_exact(data, algorithm)
    return {
        "passed": exact and kill.killed == times and return_mean >= BAR,
        "killed": kill.killed,
        "restarts": data.ledger.restarts,
        "ledger_exact": exact,
        "env_steps": data.ledger.delivered,
        "discarded": dict(data.ledger.discarded),
        "return_mean": round(return_mean, 2),
    }


def memory(minutes: float = 10.0, seed: int = 1) -> dict[str, Any]:
    """See "memory" above."""
    with tempfile.TemporaryDirectory() as folder:
        data = RolloutDataModule(
            Dawdling, env_kwargs={"lock": f"{folder}/slow", "owner": os.getpid()}, prefetch=2, fragments_per_batch=1,
            seed=seed, **SIZE,
        )  # fmt: skip
        algorithm, watch = IMPALA(), Watch(minutes)
        trainer = quiet_trainer(watch)
        trainer.fit(algorithm, data)
    metrics, exact = trainer.callback_metrics, is_exact(data, algorithm)
    least = float(metrics["rollout/least_share"])
    slope = growth(watch.samples, min(WARM_UP_S / 60, minutes / 2))
    return {
        "passed": exact and least > 0 and slope < MOST_GROWTH,
        "minutes": minutes,
        "mb_per_minute": slope,
        "first_mb": round(watch.samples[0][1], 1),
        "last_mb": round(watch.samples[-1][1], 1),
        "least_share": round(least, 4),
        "greatest_share": round(float(metrics["rollout/greatest_share"]), 4),
        "ledger_exact": exact,
        "env_steps": data.ledger.delivered,
        "updates": algorithm.updates_done,
        "samples": [
            [round(minute, 2), round(mb, 1)] for minute, mb in watch.samples[:: max(1, len(watch.samples) // 60)]
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=["killed", "memory"])
    parser.add_argument("--minutes", type=float, default=10.0, help='of "memory"')
    parser.add_argument("--env-steps", type=int, default=1_000_000, help='of "killed"')
    parser.add_argument("--times", type=int, default=10, help='of "killed": runners that are killed')
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="write docs/results/async_<check>.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.check == "killed":
        found = killed(args.times, args.env_steps, args.seed)
    else:
        found = memory(args.minutes, args.seed)
    print("\n".join(f"{name}: {value}" for name, value in found.items() if name != "samples"))
    if args.write:
        write(f"async_{args.check}.json", found)
    sys.exit(not found["passed"])


if __name__ == "__main__":
    main()
