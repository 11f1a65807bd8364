"""CQL and IQL beside d3rlpy's, on the same recorded data: returns and updates per second.

d3rlpy pins gymnasium, and so needs a virtual environment of its own:

    python -m venv ../d3rlpy
    ../d3rlpy/bin/pip install -c constraints.txt torch d3rlpy pyarrow mujoco imageio
    .venv/bin/python benchmarks/offline_data.py
    .venv/bin/python benchmarks/d3rlpy_offline.py --d3rlpy-python ../d3rlpy/bin/python --write

Both libraries learn from the Parquet files of `pendulum_mixed`, with the settings of `cql_pendulum` and `iql_pendulum`:
networks, minibatches of 256, learning rates and their schedules, number of updates. d3rlpy has the whole squared TD
error where lit_rl has half of it, so its CQL gets twice the conservative weight, held fixed as here. What else differs
is in docs/offline_algorithms.md. For HalfCheetah with one seed:

    .venv/bin/python benchmarks/offline_data.py --sets halfcheetah_medium
    .venv/bin/python benchmarks/d3rlpy_offline.py --d3rlpy-python ../d3rlpy/bin/python --task halfcheetah --seeds 1 \\
        --write

Each run is a process of its own with one thread, the libraries in turns. Its last policy then plays 100 greedy
episodes, from the same start states in both libraries. Of the returns of the seeds there is the mean with its 95 %
interval (Student's t). Updates per second are measured in the same runs, after the first 200 updates, by CPU time,
which other work on the machine disturbs less than the clock's. Ratios are made within each seed.

What was measured stays in `--folder`: a benchmark that was broken off goes on where it was. The figures are in
docs/results/d3rlpy_offline.json, and in d3rlpy_offline_halfcheetah.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Task:
    env: str
    data: str
    max_action: float
    hidden_sizes: tuple[int, ...]
    updates: Mapping[str, int]
    lr: float
    cql_actor_lr: float
    min_q_weight: float
    results: str


TASKS = {
    "pendulum": Task(
        "Pendulum-v1", "pendulum_mixed", 2.0, (128, 128), {"CQL": 5_000, "IQL": 6_000}, 1e-3, 3e-4, 1.0,
        "d3rlpy_offline.json",
    ),
    "halfcheetah": Task(
        "HalfCheetah-v5", "halfcheetah_medium", 1.0, (256, 256), {"CQL": 10_000, "IQL": 20_000}, 3e-4, 1e-4, 2.5,
        "d3rlpy_offline_halfcheetah.json",
    ),
}  # fmt: skip
GAMMA, TAU, BATCH = 0.99, 0.005, 256
PER_EPOCH, WARM_UP = 1_000, 200  # updates
NUM_ACTIONS = 4  # of CQL
EXPECTILE, BETA, MAX_WEIGHT = 0.7, 3.0, 100.0  # of IQL
EPISODES = 100
T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # the t distribution's 97.5 % quantile, by the number of seeds

Figures = dict[str, Any]


# --- lit_rl -----------------------------------------------------------------------------------------------------------


def lit_rl(name: str, task: Task, seed: int, data: Path) -> Figures:
    import functools
    import math

    import lightning as L
    from measuring import Clock, quiet_trainer

    import lit_rl
    from lit_rl import MLP, OfflineDataModule

    options: Figures = {
        "lr": task.lr, "gamma": GAMMA, "tau": TAU, "critic_hidden_sizes": task.hidden_sizes,
        "network": functools.partial(MLP, hidden_sizes=task.hidden_sizes, activation="relu"),
    }  # fmt: skip
    if name == "CQL":
        options |= {"actor_lr": task.cql_actor_lr, "min_q_weight": task.min_q_weight, "num_actions": NUM_ACTIONS}
    else:
        options |= {
            "lr_schedule": "linear", "actor_lr_schedule": "cosine",
            "expectile": EXPECTILE, "beta": BETA, "max_weight": MAX_WEIGHT,
        }  # fmt: skip
    L.seed_everything(seed, verbose=False)
    per_batch = 100
    recorded = OfflineDataModule(
        str(data), max_updates=task.updates[name], updates_per_batch=per_batch,
        batches_per_epoch=PER_EPOCH // per_batch, batch_size=BATCH, torch_threads=1,
    )  # fmt: skip
    algorithm, clock = getattr(lit_rl, name)(**options), Clock(math.inf, WARM_UP // per_batch)
    quiet_trainer(clock).fit(algorithm, recorded)
    policy = algorithm.policy.eval()
    return {
        "updates_per_cpu_s": round(clock.updates / clock.cpu_seconds, 1),
        "returns": play(task.env, lambda obs: policy.act(obs)[0], seed),
    }


# --- d3rlpy -----------------------------------------------------------------------------------------------------------


def d3rlpy(name: str, task: Task, seed: int, data: Path) -> Figures:
    import d3rlpy
    import torch
    from d3rlpy.models import VectorEncoderFactory
    from d3rlpy.optimizers import AdamFactory
    from d3rlpy.optimizers.lr_schedulers import CosineAnnealingLRFactory, LRSchedulerFactory
    from d3rlpy.preprocessing import MinMaxActionScaler

    torch.set_num_threads(1)
    d3rlpy.seed(seed)
    updates = task.updates[name]

    class Linear(LRSchedulerFactory):
        def create(self, optim: Any) -> Any:
            return torch.optim.lr_scheduler.LambdaLR(optim, lambda step: 1 - step / updates)

        @staticmethod
        def get_type() -> str:
            return "linear"

    episodes = episodes_of(data)
    bounds = np.full(episodes[0].actions.shape[1], task.max_action)
    encoder = VectorEncoderFactory(hidden_units=list(task.hidden_sizes), activation="relu")
    options: Figures = {
        "batch_size": BATCH, "gamma": GAMMA, "tau": TAU, "critic_learning_rate": task.lr,
        "actor_encoder_factory": encoder, "critic_encoder_factory": encoder,
        "action_scaler": MinMaxActionScaler(minimum=-bounds, maximum=bounds),
    }  # fmt: skip
    if name == "CQL":
        config = d3rlpy.algos.CQLConfig(
            **options, actor_learning_rate=task.cql_actor_lr, temp_learning_rate=task.lr, alpha_learning_rate=0.0,
            conservative_weight=2 * task.min_q_weight, n_action_samples=NUM_ACTIONS,
        )  # fmt: skip
    else:
        config = d3rlpy.algos.IQLConfig(
            **options, actor_learning_rate=task.lr, value_encoder_factory=encoder,
            actor_optim_factory=AdamFactory(lr_scheduler_factory=CosineAnnealingLRFactory(T_max=updates)),
            critic_optim_factory=AdamFactory(lr_scheduler_factory=Linear()),
            expectile=EXPECTILE, weight_temp=BETA, max_weight=MAX_WEIGHT,
        )  # fmt: skip
    algorithm = config.create(device="cpu:0")
    marks: dict[int, float] = {}

    def mark(_: Any, __: int, step: int) -> None:
        if step in (WARM_UP, updates):
            marks[step] = time.process_time()

    algorithm.fit(
        d3rlpy.dataset.create_infinite_replay_buffer(episodes), n_steps=updates, n_steps_per_epoch=PER_EPOCH,
        logger_adapter=d3rlpy.logging.NoopAdapterFactory(), show_progress=False, callback=mark,
    )  # fmt: skip
    return {
        "updates_per_cpu_s": round((updates - WARM_UP) / (marks[updates] - marks[WARM_UP]), 1),
        "returns": play(task.env, lambda obs: algorithm.predict(obs.astype(np.float32)), seed),
        "versions": {"d3rlpy": d3rlpy.__version__, "torch": torch.__version__},
    }


def episodes_of(data: Path) -> list[Any]:
    """The recorded episodes. Each has one row more, with its final observation, from which no action is learned."""
    import pyarrow.parquet as pq
    from d3rlpy.dataset import Episode

    found = []
    for path in sorted(data.glob("*.parquet")):
        table = pq.read_table(path, columns=["episode", "observation", "action", "reward", "terminated"])
        column = {name: table[name].combine_chunks() for name in table.column_names}
        flat = {
            name: np.stack(x.to_numpy(zero_copy_only=False)) if name in ("observation", "action") else x.to_numpy(False)
            for name, x in column.items()
        }
        if flat["terminated"].any():
            raise SystemExit(f"{path}: expected episodes that are truncated, such as Pendulum's.")
        starts = np.flatnonzero(np.diff(flat["episode"], prepend=-1))
        for begin, end in zip(starts, [*starts[1:], len(flat["episode"])]):
            rows = slice(begin, end)
            found.append(
                Episode(
                    flat["observation"][rows].astype(np.float32),
                    flat["action"][rows].astype(np.float32),
                    flat["reward"][rows].astype(np.float32)[:, None],
                    terminated=False,
                )
            )
    return found


# --- both -------------------------------------------------------------------------------------------------------------


def play(env_id: str, act: Callable[[np.ndarray], np.ndarray], seed: int) -> list[float]:
    """The returns of greedy episodes, whose start states depend on the seed alone."""
    import gymnasium

    envs = [gymnasium.make(env_id) for _ in range(EPISODES)]
    starts = np.random.SeedSequence([seed, 20_000]).generate_state(EPISODES).tolist()
    obs = np.stack([env.reset(seed=start)[0] for env, start in zip(envs, starts)])
    returns, is_over = np.zeros(EPISODES), False
    while not is_over:
        actions = act(obs)
        steps = [env.step(action) for env, action in zip(envs, actions)]
        obs = np.stack([step[0] for step in steps])
        returns += [step[1] for step in steps]
        is_over = steps[0][3]  # all of them are truncated at the same step
    return returns.tolist()


LIBRARIES: dict[str, Callable[[str, Task, int, Path], Figures]] = {"lit_rl": lit_rl, "d3rlpy": d3rlpy}


def summary(runs: list[Figures]) -> Figures:
    """Of the runs of one library: the mean return with its interval, and the median speed."""
    means = [run["return_mean"] for run in runs]
    mean = statistics.mean(means)
    found: Figures = {"return_mean": round(mean, 1)}
    if len(means) > 1:
        half = T[len(means)] * statistics.stdev(means) / len(means) ** 0.5
        found["interval"] = [round(mean - half, 1), round(mean + half, 1)]
    return found | {
        "updates_per_cpu_s": statistics.median(run["updates_per_cpu_s"] for run in runs),
    }


def compared(runs: dict[str, list[Figures]]) -> Figures:
    """Of one algorithm: both libraries' figures, and how many times as many updates lit_rl makes, seed by seed."""
    speeds = {library: [run["updates_per_cpu_s"] for run in found] for library, found in runs.items()}
    ratios = [round(ours / theirs, 2) for ours, theirs in zip(speeds["lit_rl"], speeds["d3rlpy"])]
    summaries = {library: summary(found) for library, found in runs.items()}
    return {**summaries, "ratios": ratios, "median_ratio": statistics.median(ratios), "runs": runs}


def measured(library: str, name: str, task: str, seed: int, python: str, data: Path, folder: Path) -> Figures:
    """A run's figures; made in a process of its own, if that was not done before."""
    from results import commit

    kept = folder / f"{task}-{library}-{name}-{seed}.json"
    if not kept.exists():
        command = [python, __file__, "--one", library, name, str(seed), "--task", task, "--data", str(data)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise SystemExit(f"{library} {name} seed {seed} failed:\n{done.stderr[-4000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        returns = found.pop("returns")
        found |= {
            "return_mean": round(statistics.mean(returns), 1), "return_std": round(statistics.pstdev(returns), 1),
            "seed": seed, "commit": commit(),
        }  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found))
    found = json.loads(kept.read_text())
    print(
        f"{name} seed {seed} {library}: {found['return_mean']}, {found['updates_per_cpu_s']} updates per CPU s",
        flush=True,
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d3rlpy-python", default=sys.executable, help="interpreter that has d3rlpy")
    parser.add_argument("--algorithms", nargs="+", choices=["CQL", "IQL"], default=["CQL", "IQL"])
    parser.add_argument("--task", choices=list(TASKS), default="pendulum")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="one to five")
    parser.add_argument("--data", type=Path, help="default: what offline_data.py makes")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "d3rlpy_offline", help="where figures are kept")
    parser.add_argument("--write", action="store_true", help="write into docs/results")
    parser.add_argument("--one", nargs=3, metavar=("LIBRARY", "ALGORITHM", "SEED"), help="one run in this process")
    args = parser.parse_args()
    task = TASKS[args.task]
    args.data = args.data or ROOT / "runs" / "data" / task.data
    if args.one:
        warnings.filterwarnings("ignore")
        library, name, seed = args.one
        print(json.dumps(LIBRARIES[library](name, task, int(seed), args.data)))
        return
    if len(args.seeds) not in (1, *T):
        parser.error(f"--seeds: expected one to five seeds, got {len(args.seeds)}")
    pythons = {"lit_rl": sys.executable, "d3rlpy": args.d3rlpy_python}
    results: dict[str, Figures] = {}
    for name in args.algorithms:
        runs: dict[str, list[Figures]] = {library: [] for library in LIBRARIES}
        for seed in args.seeds:
            for library, python in pythons.items():
                runs[library].append(measured(library, name, args.task, seed, python, args.data, args.folder))
        results[name] = compared(runs)
        print(f"{name}: { ({key: x for key, x in results[name].items() if key != 'runs'}) }", flush=True)
    if args.write:
        from measuring import write

        commits = {run.pop("commit") for found in results.values() for runs in found["runs"].values() for run in runs}
        setup = {"env": task.env, "data": args.data.name, "updates": dict(task.updates), "episodes": EPISODES}
        write(task.results, {"commit": ", ".join(sorted(commits)), **setup, "algorithms": results})


if __name__ == "__main__":
    main()
