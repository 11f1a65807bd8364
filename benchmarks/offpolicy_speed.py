"""Env steps/s of SAC on Pendulum-v1 and DQN on CartPole-v1: lit_rl against Stable-Baselines3.

    .venv/bin/pip install -c constraints.txt -e '.[bench]'
    .venv/bin/python benchmarks/offpolicy_speed.py --rounds 5

Each system runs in a process of its own, in turns, with the same settings and one torch thread. SAC: one environment,
one update per env step, 2x256 networks, batch 256. DQN: one environment, an update every four env steps, 2x64 network,
batch 64. The time begins when learning has gone on for a while. Read the ratios: these machines are noisy.
`--sb3-python` runs SB3 in a virtual environment of its own.

Of SAC it is also printed how many updates a second the matrix products of an update alone would allow.
"""

import argparse
import functools
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

OUT = Path(__file__).resolve().parent.parent / "docs" / "results" / "speed_off_policy.json"
WARM_UP = {"sac": 600, "dqn": 4_000}  # env steps, of which random: RANDOM
RANDOM = {"sac": 300, "dqn": 1_000}
PRODUCTS = "products alone"
TIMED = {"sac": 1_500, "dqn": 16_000}


def lit_rl(task: str, compile: bool = False, continuous: str = "SAC") -> float:
    import lightning as L

    import lit_rl
    from lit_rl import DQN, MLP, ReplayDataModule

    begun: list[float] = []
    warm_up, timed = WARM_UP[task], TIMED[task]

    class Clock(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, algorithm: L.LightningModule, *_: object) -> None:
            if algorithm.env_steps_done >= warm_up:
                begun.append(time.perf_counter())

    options = {
        "max_env_steps": warm_up + timed, "learning_starts": RANDOM[task], "torch_threads": 1, "seed": 0,
        "env_steps_per_batch": 100 if task == "sac" else 500,
    }  # fmt: skip
    if task == "sac":
        data = ReplayDataModule("Pendulum-v1", buffer_size=1_000_000, batch_size=256, **options)
        algorithm = getattr(lit_rl, continuous)(lr=3e-4, compile=compile)
    else:
        data = ReplayDataModule(
            "CartPole-v1", buffer_size=1_000_000, batch_size=64, rollout_length=1, update_to_data=0.25, n_step=1,
            **options,
        )  # fmt: skip
        algorithm = DQN(
            lr=1e-3, epsilon=0.05, double=False, target_update_interval=250, tau=1.0, loss="huber", max_grad_norm=10.0,
            compile=compile,
            network=functools.partial(MLP, hidden_sizes=[64, 64], activation="relu"),
        )  # fmt: skip
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=-1, limit_val_batches=0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[Clock()],
    )  # fmt: skip
    trainer.fit(algorithm, data)
    return timed / (begun[-1] - begun[0])


def sb3(task: str, package: str = "stable_baselines3", algorithm: str | None = None) -> float:
    """An algorithm of `package`, which has Stable-Baselines3's interface; None is the task's own."""
    import torch
    from stable_baselines3.common.callbacks import BaseCallback

    torch.set_num_threads(1)
    begun: list[float] = []
    warm_up, timed = WARM_UP[task], TIMED[task]

    class Clock(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps in (warm_up, warm_up + timed):
                begun.append(time.perf_counter())
            return True

    options: dict[str, Any] = {"learning_starts": RANDOM[task], "device": "cpu"}
    if task == "sac":
        options |= {
            "env": "Pendulum-v1", "batch_size": 256, "train_freq": 1, "learning_rate": 3e-4,
            "policy_kwargs": {"net_arch": [256, 256]},
        }  # fmt: skip
    else:
        options |= {
            "env": "CartPole-v1", "batch_size": 64, "train_freq": 4, "learning_rate": 1e-3,
            "target_update_interval": 1_000, "exploration_fraction": 0.01, "policy_kwargs": {"net_arch": [64, 64]},
        }  # fmt: skip
    model = getattr(importlib.import_module(package), algorithm or task.upper())("MlpPolicy", **options)
    model.learn(warm_up + timed + 8, callback=Clock())
    return timed / (begun[1] - begun[0])


def products(task: str) -> float:
    """Updates/s if an update of SAC were its large matrix products alone: 16 of [256, 256] by [256, 256]."""
    import torch

    torch.set_num_threads(1)
    bias, x, pair = torch.randn(256), torch.randn(256, 256), torch.randn(2, 256, 256)
    begun: list[float] = []
    for _ in range(300):
        begun.append(time.perf_counter())
        for _ in range(2):  # the policy: forward on observations and next ones; backward by inputs and by weights
            torch.addmm(bias, x, x)
            torch.mm(x.t(), x)
        for _ in range(3):  # forward: target critics, critics, critics of the policy's actions
            torch.baddbmm(bias, pair, pair)
        for _ in range(2):  # backward by inputs: critics, critics of the policy's actions
            torch.bmm(pair, pair.mT)
        torch.bmm(pair.mT, pair)  # and by the critics' weights
    return 200 / (begun[-1] - begun[-201])


SYSTEMS = {
    "lit_rl": lit_rl,
    "lit_rl, compiled": functools.partial(lit_rl, compile=True),  # the time begins after compilation
    "SB3": sb3,
    PRODUCTS: products,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tasks", nargs="+", choices=list(TIMED), default=list(TIMED))
    parser.add_argument("--write", action="store_true", help=f"write {OUT.name}")
    parser.add_argument("--sb3-python", default=sys.executable, help="interpreter that has stable-baselines3")
    parser.add_argument("--one", nargs=2, metavar=("SYSTEM", "TASK"), help="run one system in this process")
    args = parser.parse_args()
    if args.one:
        warnings.filterwarnings("ignore")
        print(json.dumps({"env_steps_per_s": SYSTEMS[args.one[0]](args.one[1])}))
        return
    results = {}
    for task in args.tasks:
        speeds: dict[str, list[float]] = {name: [] for name in SYSTEMS if task == "sac" or name != PRODUCTS}
        for number in range(args.rounds):
            for name in speeds:
                python = args.sb3_python if name == "SB3" else sys.executable
                done = subprocess.run(
                    [python, __file__, "--one", name, task], capture_output=True, text=True, check=True,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )  # fmt: skip
                speeds[name].append(json.loads(done.stdout.splitlines()[-1])["env_steps_per_s"])
            print(
                f"{task} round {number + 1}: { ({name: round(found[-1]) for name, found in speeds.items()}) }",
                flush=True,
            )
        results[task] = {
            "env_steps_per_s": {name: [round(speed, 1) for speed in found] for name, found in speeds.items()}
        }
        for name in speeds.keys() - {"SB3"}:  # within each round
            ratios = [ours / theirs for ours, theirs in zip(speeds[name], speeds["SB3"])]
            results[task][f"{name} / SB3"] = [round(ratio, 3) for ratio in ratios]
            print(f"{task}: {name} / SB3, median {statistics.median(ratios):.2f}", flush=True)
    if args.write:
        OUT.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
