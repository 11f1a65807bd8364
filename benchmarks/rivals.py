"""Env steps/s of lit_rl against Stable-Baselines3, sbx (its JAX form) and rlox (Rust), with equal settings.

The rivals have a venv of their own, because they pin other versions than lit_rl does:

    python -m venv ../rivals
    ../rivals/bin/pip install -c constraints.txt torch psutil stable-baselines3 sb3-contrib sbx-rl rlox
    .venv/bin/python benchmarks/rivals.py --python ../rivals/bin/python --rounds 5 --write

Each system runs in a process of its own, in turns, on one core: XLA uses more of them, whatever it is told (`--cores 2`
lets it, and writes a file of its own). The time begins when learning has gone on for a while, so that no compilation is
in it. `TASKS` names the settings. Read the ratios, which are made within each round.
"""

import argparse
import functools
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import offpolicy_speed
import ppo_speed

OUT = Path(__file__).resolve().parent.parent / "docs" / "results" / "speed_rivals.json"
ONE_THREAD = {
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", "JAX_PLATFORMS": "cpu",
}  # fmt: skip
PACKAGES = {"SB3": "stable_baselines3", "sbx": "sbx", "rlox": "rlox"}  # what `--python` must import
VERSIONS = ("torch", "stable-baselines3", "sb3-contrib", "sbx-rl", "jax", "rlox")


def sbx_ppo() -> float:
    import sbx
    from stable_baselines3.common.env_util import make_vec_env

    watch = ppo_speed.Stopwatch()
    model = sbx.PPO(
        "MlpPolicy", make_vec_env(ppo_speed.ENV, ppo_speed.ENVS), n_steps=ppo_speed.LENGTH,
        batch_size=ppo_speed.MINIBATCH, n_epochs=ppo_speed.EPOCHS, learning_rate=2.5e-4, ent_coef=0.01,
        policy_kwargs={"net_arch": [64, 64]},
    )  # fmt: skip
    model.learn((ppo_speed.WARM_UP + ppo_speed.TIMED) * ppo_speed.ROLLOUT, callback=ppo_speed.sb3_ticker(watch))
    return watch.result()["env_steps_per_s"]


def rlox_ppo() -> float:
    """With rlox's own CartPole, written in Rust."""
    from rlox.algorithms.ppo import PPO
    from rlox.callbacks import Callback

    watch = ppo_speed.Stopwatch()

    class Tick(Callback):
        def on_step(self, **_: Any) -> bool:  # called once a rollout
            watch.tick()
            return True

    model = PPO(
        ppo_speed.ENV, n_envs=ppo_speed.ENVS, seed=0, n_steps=ppo_speed.LENGTH, n_epochs=ppo_speed.EPOCHS,
        batch_size=ppo_speed.MINIBATCH, learning_rate=2.5e-4, ent_coef=0.01, callbacks=[Tick()],
    )  # fmt: skip
    model.train((ppo_speed.WARM_UP + ppo_speed.TIMED) * ppo_speed.ROLLOUT)
    return watch.result()["env_steps_per_s"]


# Of each task the settings that all have, and the systems by name.
TASKS: dict[str, tuple[str, dict[str, Callable[[], float]]]] = {
    "ppo": (
        "PPO, CartPole-v1: 8 environments x 128 steps, 4 epochs, minibatches of 256, 2x64 tanh",
        {
            "lit_rl": lambda: ppo_speed.lit_rl()["env_steps_per_s"],
            "lit_rl, compiled": lambda: ppo_speed.lit_rl(compile=True)["env_steps_per_s"],
            "SB3": lambda: ppo_speed.sb3()["env_steps_per_s"],
            "sbx": sbx_ppo,
            "rlox": rlox_ppo,
        },
    ),
    "dqn": (
        "DQN, CartPole-v1: an update every 4 env steps, batches of 64, 2x64",
        {
            "lit_rl": lambda: offpolicy_speed.lit_rl("dqn"),
            "lit_rl, compiled": lambda: offpolicy_speed.lit_rl("dqn", compile=True),
            "SB3": lambda: offpolicy_speed.sb3("dqn"),
            "sbx": lambda: offpolicy_speed.sb3("dqn", "sbx"),
        },
    ),
    "sac": (
        "SAC, Pendulum-v1: an update each env step, batches of 256, 2x256",
        {
            "lit_rl": lambda: offpolicy_speed.lit_rl("sac"),
            "lit_rl, compiled": lambda: offpolicy_speed.lit_rl("sac", compile=True),
            "SB3": lambda: offpolicy_speed.sb3("sac"),
            "sbx": lambda: offpolicy_speed.sb3("sac", "sbx"),
        },
    ),
    "tqc": (
        "TQC, Pendulum-v1: an update each env step, batches of 256, 2x256, 2 critics of 25 quantiles",
        {
            "lit_rl": lambda: offpolicy_speed.lit_rl("sac", continuous="TQC"),
            "lit_rl, compiled": lambda: offpolicy_speed.lit_rl("sac", compile=True, continuous="TQC"),
            "SB3": lambda: offpolicy_speed.sb3("sac", "sb3_contrib", "TQC"),
            "sbx": lambda: offpolicy_speed.sb3("sac", "sbx", "TQC"),
        },
    ),
}


def versions_of_rivals(python: str, systems: set[str]) -> dict[str, str]:
    """The versions of what an interpreter has; raises ValueError if it does not have the rivals."""
    packages = [PACKAGES[name] for name in PACKAGES if name in systems]
    packages += ["sb3_contrib"] if "SB3" in systems else []
    code = (
        f"import {', '.join(packages)}, json, importlib.metadata as m; names = {VERSIONS}\n"
        "found = {d.metadata['Name'].replace('_', '-'): d.version for d in m.distributions()}\n"
        "print(json.dumps({name: found[name] for name in names if name in found}))"
    )
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    except OSError as error:
        raise ValueError(f"--python {python}: expected an interpreter, got {error}.") from None
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1]
        raise ValueError(
            f"--python {python}: expected an interpreter with {', '.join(packages)}, got {reason}. "
            "The first lines of this file say how to make one."
        )
    return json.loads(done.stdout)


def stay_on(cores: int) -> None:
    """Of those that this process may use the first, where the system can be told so."""
    if sys.platform == "linux":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])


def run(python: str, task: str, name: str, cores: int) -> float:
    """Env steps/s of one system, measured in a process of its own."""
    command = [python, __file__, "--one", task, name]
    pin = functools.partial(stay_on, cores)
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | ONE_THREAD, preexec_fn=pin)
    if done.returncode:
        sys.exit(f"{task}, {name} failed:\n{done.stderr[-3000:]}")
    return float(done.stdout.splitlines()[-1])


def table(results: dict[str, Any]) -> str:
    """Medians of the rounds: env steps/s of each system, and how many times a rival's lit_rl reaches."""
    lines = ["| task | system | env steps/s | lit_rl / it | lit_rl, compiled / it |", "|---|---|---|---|---|"]
    for task, found in results.items():
        for name, speeds in found["env_steps_per_s"].items():
            ratios = [found["ratios"].get(f"{ours} / {name}") for ours in ("lit_rl", "lit_rl, compiled")]
            cells = [f"{statistics.median(ratio):.2f}" if ratio else "" for ratio in ratios]
            lines.append(f"| {task} | {name} | {statistics.median(speeds):,.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def with_ratios(speeds: dict[str, list[float]]) -> dict[str, Any]:
    """Speeds, and the ratio of each of ours to each rival's within each round."""
    ours = [name for name in speeds if name.startswith("lit_rl")]
    return {
        "env_steps_per_s": {name: [round(speed, 1) for speed in found] for name, found in speeds.items()},
        "ratios": {
            f"{our} / {name}": [round(a / b, 3) for a, b in zip(speeds[our], speeds[name])]
            for our in ours
            for name in speeds
            if name not in ours
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", help="the rivals' interpreter")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--cores", type=int, default=1, help="that a system may use")
    parser.add_argument("--write", action="store_true", help=f"write {OUT.name}")
    parser.add_argument("--one", nargs=2, metavar=("TASK", "SYSTEM"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        import torch

        warnings.filterwarnings("ignore")
        torch.set_num_threads(1)
        print(TASKS[args.one[0]][1][args.one[1]]())
        return
    if args.python is None:
        parser.error("expected --python, the interpreter of the venv with the rivals")
    try:
        versions = versions_of_rivals(args.python, {name for task in args.tasks for name in TASKS[task][1]})
    except ValueError as error:
        parser.error(str(error))
    results: dict[str, Any] = {}
    for task in args.tasks:
        settings, systems = TASKS[task]
        speeds: dict[str, list[float]] = {name: [] for name in systems}
        for number in range(args.rounds):
            for name in systems:
                python = sys.executable if name.startswith("lit_rl") else args.python
                speeds[name].append(run(python, task, name, args.cores))
                print(f"round {number + 1}  {task}  {name:18s} {speeds[name][-1]:8.0f} env steps/s", flush=True)
        results[task] = {"settings": settings, **with_ratios(speeds)}
    print(f"\nMedians of {args.rounds} rounds\n{table(results)}")
    if args.write:
        ours = {name: importlib.metadata.version(name) for name in ("torch", "lightning", "gymnasium")}
        result = {
            "rounds": args.rounds,
            "cores": args.cores,
            "versions": {"lit_rl's": ours, "rivals'": versions},
            "tasks": results,
        }
        out = OUT if args.cores == 1 else OUT.with_stem(f"{OUT.stem}_{args.cores}_cores")
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
