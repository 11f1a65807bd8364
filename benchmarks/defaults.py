"""What one gets without choosing anything: lit_rl's defaults against Stable-Baselines3's, at equal env steps.

    python -m venv ../rivals && ../rivals/bin/pip install -c constraints.txt torch stable-baselines3 mujoco box2d pygame
    .venv/bin/python benchmarks/defaults.py --sb3-python ../rivals/bin/python

Each run gets an algorithm without arguments, the name of the environment, a budget and a seed, on one torch thread, in
a process of its own. Its last policy then plays 50 greedy episodes, the same for both libraries. Time is the
processor's, of training alone, so that what else the machine does counts little. Writes `docs/results/defaults.json`
after every run, and leaves out the runs that are in it (`--again` repeats those of lit_rl); `--table` prints its table.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "results" / "defaults.json"
TASKS = [  # algorithm, environment, env steps
    ("PPO", "CartPole-v1", 50_000),
    ("PPO", "Acrobot-v1", 100_000),
    ("PPO", "InvertedPendulum-v5", 60_000),
    ("PPO", "Pendulum-v1", 100_000),
    ("PPO", "LunarLander-v3", 200_000),
    ("DQN", "CartPole-v1", 50_000),
    ("SAC", "Pendulum-v1", 8_000),
    ("SAC", "MountainCarContinuous-v0", 50_000),
]
SYSTEMS = ("SB3", "lit_rl")
EPISODES = 50


def lit_rl(algorithm: str, env: str, env_steps: int, seed: int) -> Callable[[Any], Any]:
    """Train, and give what acts: observations [B, ...] to actions."""
    import lightning as L

    import lit_rl

    data_class = lit_rl.RolloutDataModule if algorithm == "PPO" else lit_rl.ReplayDataModule
    data = data_class(env, max_env_steps=env_steps, seed=seed, torch_threads=1)
    L.seed_everything(seed, verbose=False)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=-1, limit_val_batches=0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = getattr(lit_rl, algorithm)()
    trainer.fit(module, data)
    return lambda obs: module.policy.act(obs)[0]


def sb3(algorithm: str, env: str, env_steps: int, seed: int) -> Callable[[Any], Any]:
    import stable_baselines3
    import torch

    torch.set_num_threads(1)
    model = getattr(stable_baselines3, algorithm)("MlpPolicy", env, seed=seed, device="cpu").learn(env_steps)
    return lambda obs: model.predict(obs, deterministic=True)[0]


def greedy_return(act: Callable[[Any], Any], env_id: str) -> float:
    """Mean return of `EPISODES` episodes, each with a seed of its own."""
    import gymnasium
    import numpy as np

    returns = []
    env = gymnasium.make(env_id)
    for episode in range(EPISODES):
        obs, _ = env.reset(seed=10_000 + episode)
        total, done = 0.0, False
        while not done:
            obs, reward, terminated, truncated, _ = env.step(np.asarray(act(obs[None]))[0])
            total, done = total + float(reward), terminated or truncated
        returns.append(total)
    return statistics.mean(returns)


def run_one(system: str, algorithm: str, env: str, env_steps: int, seed: int) -> dict[str, float]:
    train = sb3 if system == "SB3" else lit_rl
    started, processor = time.perf_counter(), time.process_time()
    act = train(algorithm, env, env_steps, seed)
    seconds = {"cpu_s": round(time.process_time() - processor, 1), "wall_s": round(time.perf_counter() - started, 1)}
    return {"return_mean": round(greedy_return(act, env), 2), **seconds}


def load() -> dict[str, dict[str, dict[str, Any]]]:
    return json.loads(OUT.read_text()) if OUT.exists() else {}


def table() -> str:
    """Per task: each library's median, its seeds, and its median time."""
    lines = ["| | lit_rl | seeds | s | SB3 | seeds | s |", "|---|---|---|---|---|---|---|"]
    for name, systems in load().items():
        cells = []
        for system in reversed(SYSTEMS):
            runs = [run for _, run in sorted(systems.get(system, {}).items())]
            returns = [run["return_mean"] + 0.0 for run in runs]  # a sum of -0.0 is written as 0
            cells += [f"{statistics.median(returns):.5g}", ", ".join(f"{found:.4g}" for found in returns)]
            cells += [f"{statistics.median(run['cpu_s'] for run in runs):.0f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sb3-python", default=sys.executable, help="the interpreter that has stable-baselines3")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--tasks", nargs="+", default=["PPO", "DQN", "SAC"], help="those whose name has one of these")
    parser.add_argument("--again", action="store_true", help="repeat lit_rl's runs")
    parser.add_argument("--table", action="store_true", help="print the table and nothing else")
    parser.add_argument("--one", nargs=5, metavar=("SYSTEM", "ALGORITHM", "ENV", "ENV_STEPS", "SEED"))
    args = parser.parse_args()
    if args.table:
        print(table())
        return
    if args.one:
        warnings.filterwarnings("ignore")
        system, algorithm, env, env_steps, seed = args.one
        print(json.dumps(run_one(system, algorithm, env, int(env_steps), int(seed))))
        return
    for algorithm, env, env_steps in TASKS:
        name = f"{algorithm} {env} {env_steps // 1000}k"
        if not any(part in name for part in args.tasks):
            continue
        for seed in args.seeds:
            for system in args.systems:
                found = load().get(name, {}).get(system, {}).get(str(seed))
                if found and not (args.again and system == "lit_rl"):
                    continue
                python = args.sb3_python if system == "SB3" else sys.executable
                command = [python, __file__, "--one", system, algorithm, env, str(env_steps), str(seed)]
                environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                done = subprocess.run(command, capture_output=True, text=True, env=environment)
                if done.returncode:
                    sys.exit(f"{name}, {system}, seed {seed} failed:\n{done.stderr[-4000:]}")
                result = json.loads(done.stdout.splitlines()[-1])
                print(f"{name} {system} seed {seed}: {result}", flush=True)
                rows = load()
                rows.setdefault(name, {}).setdefault(system, {})[str(seed)] = result
                OUT.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
