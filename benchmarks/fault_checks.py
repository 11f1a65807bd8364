"""What the checks of env steps cost: a runner's env steps/s with them and without, in turns.

    .venv/bin/python benchmarks/fault_checks.py

Sixteen CartPoles in one runner, fragments of 64 steps, one thread; the median ratio of rounds in which both ran, and
in which order changes. Seconds are those of the processor that the process had, so that what else runs on the machine
counts little. The checks: types and shapes of each step's result, finite numbers, the ledger; in an actor the limits of
time (an alarm of the kernel) and the heartbeat; in process what an exact resume needs, the actions of episodes under
way and the state of the generator with which each began.
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
from lit_rl.envs.vector import SyncVectorEnv
from lit_rl.runners import env_runner
from lit_rl.runners.faults import Heartbeat, Watchdog
from lit_rl.runners.fragment import Fragment
from lit_rl.runners.ledger import Entry

NUM_ENVS, LENGTH, FRAGMENTS = 16, 64, 1


class UncheckedEnvs(SyncVectorEnv):
    """Steps as its base does, looks at nothing and survives nothing."""

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        observations, rewards, terminations, truncations = [], [], [], []
        infos: dict[str, Any] = {}
        for i, action in enumerate(self._each(actions)):
            env_obs, reward, terminated, truncated, info = self.envs[i].step(action)
            if terminated or truncated:
                infos = self._add_info(infos, {"final_obs": env_obs.copy(), "final_info": info}, i)
                env_obs, info = self.envs[i].reset()
            if info:
                infos = self._add_info(infos, info, i)
            observations.append(env_obs)
            rewards.append(reward)
            terminations.append(terminated)
            truncations.append(truncated)
        return (
            np.array(observations, self._batch.dtype),
            np.array(rewards, np.float64),
            np.array(terminations, np.bool_),
            np.array(truncations, np.bool_),
            infos,
        )


class Unchecked(EnvRunner):
    """Without the checks that come once per fragment."""

    def sample(self) -> Fragment:
        check, env_runner.check_finite = env_runner.check_finite, lambda *_: None
        try:
            return super().sample()
        finally:
            env_runner.check_finite = check


def make(kind: str, folder: Path) -> EnvRunner:
    env = EnvConfig("CartPole-v1")
    torch.manual_seed(0)
    policy, seed = Policy(env.spec()), np.random.SeedSequence(0)
    options: dict[str, Any] = {"num_envs": NUM_ENVS, "rollout_length": LENGTH, "seed": seed}
    if kind == "an actor":
        watchdog = Watchdog(FaultTolerance(), Heartbeat.create(folder / "beat"))
        return EnvRunner(env, policy, watchdog=watchdog, **options)
    if kind == "in process":
        return EnvRunner(env, policy, replayable=True, **options)
    runner = Unchecked(env, policy, **options)
    runner._envs.__class__ = UncheckedEnvs
    return runner


def env_steps_per_s(runner: EnvRunner) -> float:
    started = time.process_time()
    for _ in range(FRAGMENTS):
        entry: Entry = runner.sample().entry
        assert entry.delivered == NUM_ENVS * LENGTH
    return FRAGMENTS * LENGTH * NUM_ENVS / (time.process_time() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        runners = {kind: make(kind, Path(folder)) for kind in ("without", "in process", "an actor")}
        speeds: dict[str, list[float]] = {kind: [] for kind in runners}
        order = list(runners)
        for number in range(args.rounds + 2):
            order = order[1:] + order[:1] if number % 2 else order[::-1]
            for kind in order:
                speed = env_steps_per_s(runners[kind])
                if number >= 2:
                    speeds[kind].append(speed)
        signal.setitimer(signal.ITIMER_REAL, 0)
    for kind in ("in process", "an actor"):
        ratios = np.array(speeds[kind]) / np.array(speeds["without"])
        low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
        speed = statistics.median(speeds[kind])
        print(f"{kind}: {speed:.0f} env steps/s, {middle:.3f} of without checks ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
