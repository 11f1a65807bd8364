"""Env steps/s of free-running IMPALA over the number of env runners, in environments that sleep in each step.

    .venv/bin/python benchmarks/async_scaling.py --write

Runners are processes with one environment each. The ideal is `runners / sleep`: a step that only slept. The time of a
cell begins once `WARM_UP` batches were learned and no start of processes is in it. Prints for each cell the env steps/s
and their share of the ideal, the share of its time that the learner waited, that runners waited, and how many updates
old rows were. About 6 minutes for all cells on two idle cores, of which the starts of runners are a half. Environments
of 1 ms by 16 runners need more than two cores.

    .venv/bin/python benchmarks/async_scaling.py --sizes

prints how many bytes a fragment and the weights have, from which docs/asynchronous.md counts. It needs ale-py.
"""

import argparse
import time
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from measuring import Clock, quiet_trainer, write

from lit_rl import IMPALA, EnvRunner, NatureCNN, Policy, RolloutDataModule
from lit_rl.envs.make import EnvConfig
from lit_rl.runners.transport import pack_weights

WARM_UP = 5  # batches: what was collected while the learner started is learned by then
LENGTHS = {1: 64, 10: 32, 100: 4}  # of fragments, by the milliseconds of a step: 64 to 400 ms each
COLUMNS = ("sleep_ms", "runners", "env_steps_per_s", "of_ideal", "learner_idle", "runner_idle", "policy_lag")


class Sleeping(gym.Env):
    """Sleeps for some seconds in each step. Episodes of 100 steps."""

    def __init__(self, seconds: float):
        self.observation_space, self.action_space = gym.spaces.Box(-1, 1, (4,)), gym.spaces.Discrete(2)
        self._seconds = seconds

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self._steps = 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        time.sleep(self._seconds)
        self._steps += 1
        return self._observe(), 1.0, False, self._steps == 100, {}

    def _observe(self) -> np.ndarray:
        return self.np_random.uniform(-1, 1, 4).astype(np.float32)


def measure(sleep_ms: int, runners: int, seconds: float) -> dict[str, float]:
    """One cell of the table."""
    data = RolloutDataModule(
        Sleeping, env_kwargs={"seconds": sleep_ms / 1000}, num_env_runners=runners, num_envs_per_env_runner=1,
        rollout_length=LENGTHS[sleep_ms], prefetch=max(2, runners), torch_threads=1, seed=0,
    )  # fmt: skip
    clock = Clock(seconds, WARM_UP, ["time/sample_s", "rollout/policy_lag"])
    trainer = quiet_trainer(clock)
    trainer.fit(IMPALA(), data)
    speed = clock.env_steps / clock.seconds
    return {
        "sleep_ms": sleep_ms,
        "runners": runners,
        "env_steps_per_s": round(speed, 1),
        "of_ideal": round(speed * sleep_ms / 1000 / runners, 3),
        "learner_idle": round(clock.means["time/sample_s"] * clock.updates / clock.seconds, 3),
        "runner_idle": round(float(trainer.callback_metrics["rollout/runner_idle"]), 3),
        "policy_lag": round(clock.means["rollout/policy_lag"], 2),
    }


def table(cells: list[dict[str, float]]) -> str:
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines += [f"| {' | '.join(f'{cell[name]:g}' for name in COLUMNS)} |" for cell in cells]
    return "\n".join(lines)


def sizes(env: EnvConfig, network: Any = None, num_envs: int = 8, length: int = 50) -> tuple[int, int]:
    """Bytes of a fragment, and of the weights that runners are sent."""
    policy = Policy(env.spec(), network=network)
    runner = EnvRunner(env, policy, num_envs=num_envs, rollout_length=length, seed=np.random.SeedSequence(0))
    fragment = runner.sample()
    runner.close()
    return fragment.rows.buffer.nbytes + fragment.finals.buffer.nbytes, pack_weights(policy).buffer.nbytes


def print_sizes() -> None:
    atari = {"autoreset_mode": "SameStep", "repeat_action_probability": 0.0, "reward_clipping": False}
    for env, network in (
        (EnvConfig("CartPole-v1"), None),
        (EnvConfig("ale_py:ALE/Pong-v5", atari, vectorization="native"), NatureCNN),
    ):
        fragment, weights = sizes(env, network)
        print(
            f"{env.env_id}: {fragment:,} bytes in a fragment of 8 x 50 env steps ({fragment / 400:,.0f} per env step), "
            f"{weights:,} bytes of weights"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sleep-ms", nargs="+", type=int, choices=list(LENGTHS), default=list(LENGTHS))
    parser.add_argument("--runners", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--seconds", type=float, default=10.0, help="of each cell")
    parser.add_argument("--sizes", action="store_true", help="measure nothing: print the bytes that are sent")
    parser.add_argument("--write", action="store_true", help="write docs/results/async_scaling.json")
    args = parser.parse_args()
    if args.sizes:
        print_sizes()
        return
    import ray

    torch.set_num_threads(1)
    # Ray starts as many processes at a time as it has CPUs.
    ray.init(num_cpus=max(args.runners), include_dashboard=False, logging_level="warning")
    cells = []
    try:
        for sleep_ms in args.sleep_ms:
            for runners in args.runners:
                cells.append(measure(sleep_ms, runners, args.seconds))
                print(cells[-1], flush=True)
    finally:
        ray.shutdown()
    print(f"\n{table(cells)}")
    if args.write:
        write("async_scaling.json", {"seconds": args.seconds, "rollout_lengths": LENGTHS, "cells": cells})


if __name__ == "__main__":
    main()
