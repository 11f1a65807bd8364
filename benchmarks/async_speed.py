"""IMPALA and APPO with env runners that do not wait: lit_rl against RLlib, and lit_rl's APPO against its own PPO.

RLlib needs packages that lit_rl does not: a venv of its own, or `.[bench]`.

    python -m venv ../rllib
    ../rllib/bin/pip install -c constraints.txt torch 'ray[rllib]' gymnasium
    .venv/bin/python benchmarks/async_speed.py --rllib-python ../rllib/bin/python --rounds 3 --write
    .venv/bin/python benchmarks/async_speed.py --rllib-python ../rllib/bin/python --time-to 450 --write
    .venv/bin/python benchmarks/async_speed.py --tasks ppo --rounds 5 --write

The first command compares speeds: CartPole-v1, 2 runners of 8 environments, fragments of 50 steps of each, two of them
in a gradient step, policy and critic of 2x64 tanh units each, no evaluation. APPO learns from each batch twice, from a
circular buffer of 8 batches. The clock begins when the first batch was learned, and ends `--seconds` later. Learned
rows count repeats. "dropped" is the share of collected env steps, times their uses, that were not learned from then.
RLlib runs with its learner in an actor (its default) and in the process that trains: read the faster one.

`--time-to` takes the seconds from the first batch that was learned until the mean return of the last 100 training
episodes reaches a number, over `--seeds`, with each library's tuned settings: `TUNED` here, and RLlib's own
rllib/examples/algorithms/{impala,appo}/cartpole_*.py there.

The task "ppo" has 8 environments x 128 steps in each of 2 runners and 4 passes over each row: free-running APPO against
PPO with `prefetch=1`, with minibatches of 256 rows and of whole rollouts, as APPO has.

Systems run in processes of their own, in turns, with one torch thread. Read the ratios, which are made within each
round. On two idle cores a round takes 4 minutes, and `--time-to` 5 to 20 minutes a seed.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

RUNNERS, ENVS, LENGTH, REUSES, BUFFER = 2, 8, 50, 2, 8
ROWS = RUNNERS * ENVS * LENGTH  # of a gradient step
PPO_LENGTH, PASSES = 128, 4
MOST_S = 600.0  # for a return to be reached
STREAM: dict[str, Any] = {"num_env_runners": RUNNERS, "num_envs_per_env_runner": ENVS, "torch_threads": 1}
AGAIN = {"num_reuses": REUSES, "circular_buffer_batches": BUFFER}
# Of --time-to: options of the algorithm, and of its RolloutDataModule.
TUNED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "IMPALA": ({"lr": 1e-3, "lr_schedule": "linear"}, {"max_env_steps": 1_000_000}),
    "APPO": (
        {
            "lr": 1e-3,
            "lr_schedule": "linear",
            "max_grad_norm": 0.5,
            "normalize_advantage": True,
            "normalize_returns": True,
        },
        {"max_env_steps": 500_000, "num_reuses": 4},
    ),
}


# --- lit_rl -----------------------------------------------------------------------------------------------------------


def lit_rl(name: str, seconds: float, length: int = LENGTH, stream: Any = None, **options: Any) -> dict[str, float]:
    """Speed of an algorithm of lit_rl, whose runners are free-running if `stream` says nothing else."""
    from measuring import Clock, quiet_trainer

    import lit_rl
    from lit_rl import RolloutDataModule

    stream = {"prefetch": RUNNERS} | (stream or {})
    data = RolloutDataModule("CartPole-v1", rollout_length=length, seed=0, **STREAM, **stream)
    clock = Clock(seconds)
    quiet_trainer(clock).fit(getattr(lit_rl, name)(**options), data)
    rows, passes = RUNNERS * ENVS * length, options.get("num_epochs", 1)
    uses = stream.get("num_reuses", passes)
    return speeds(clock.seconds, clock.updates, clock.updates * rows * passes, clock.env_steps, uses)


def speeds(seconds: float, updates: float, learned: float, collected: float, uses: int) -> dict[str, float]:
    """What is compared, of counts in a time."""
    return {
        "learned_rows_per_s": round(learned / seconds, 1),
        "env_steps_per_s": round(collected / seconds, 1),
        "updates_per_s": round(updates / seconds, 2),
        "dropped": round(max(0.0, 1 - learned / (collected * uses)), 3),
    }


def lit_rl_until(name: str, goal: float, seed: int) -> dict[str, float]:
    import lightning as L
    from measuring import quiet_trainer

    import lit_rl
    from lit_rl import RolloutDataModule

    class Stop(L.Callback):
        reached = math.inf
        learned = 0.0

        def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
            self.learned = self.learned or time.perf_counter()
            # The first 100 episodes are far too short for it, so that the mean is never one of fewer.
            if trainer.callback_metrics.get("rollout/return_mean", 0.0) >= goal:
                self.reached, trainer.should_stop = time.perf_counter(), True

    options, stream = TUNED[name]
    data = RolloutDataModule("CartPole-v1", rollout_length=LENGTH, prefetch=RUNNERS, seed=seed, **STREAM, **stream)
    algorithm, stop = getattr(lit_rl, name)(**options), Stop()
    L.seed_everything(seed, verbose=False)
    started = time.perf_counter()
    quiet_trainer(stop).fit(algorithm, data)
    return times(started, stop.learned, stop.reached, algorithm.env_steps_done)


def times(started: float, learned: float, reached: float, env_steps: float) -> dict[str, float]:
    return {
        "seconds": round(reached - learned, 2),
        "seconds_with_start": round(reached - started, 2),
        "env_steps": env_steps,
    }


# --- RLlib ------------------------------------------------------------------------------------------------------------


def rllib_config(name: str, learners: int, seed: int = 0) -> Any:
    """RLlib's of CartPole-v1, reporting every second."""
    import ray
    from ray.rllib.algorithms.appo import APPOConfig
    from ray.rllib.algorithms.impala import IMPALAConfig

    ray.init(num_cpus=RUNNERS + 2, include_dashboard=False, log_to_driver=False)
    return (
        (IMPALAConfig() if name == "IMPALA" else APPOConfig())
        .environment("CartPole-v1")
        .learners(num_learners=learners)
        .reporting(min_time_s_per_iteration=1, metrics_num_episodes_for_smoothing=100)
        .debugging(seed=seed)
    )


def updates_of(result: dict[str, Any]) -> int:
    """Gradient steps so far; 0 if the learner did not report since the last result."""
    found = result.get("learners", {}).get("default_policy", {}).get("weights_seq_no", math.nan)
    return 0 if math.isnan(found) else int(found)


def rllib(name: str, seconds: float, learners: int) -> dict[str, float]:
    """Speed of an algorithm of RLlib."""
    from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig

    network = {
        "fcnet_hiddens": [64, 64],
        "fcnet_activation": "tanh",
        "head_fcnet_hiddens": [],
        "vf_share_layers": False,
    }
    again = {"circular_buffer_num_batches": BUFFER, "circular_buffer_iterations_per_batch": REUSES}
    config = (
        rllib_config(name, learners)
        .env_runners(num_env_runners=RUNNERS, num_envs_per_env_runner=ENVS, rollout_fragment_length=LENGTH)
        .training(train_batch_size_per_learner=ROWS, **({} if name == "IMPALA" else again))
        .rl_module(model_config=DefaultModelConfig(**network))
    )
    algorithm = config.build_algo()
    first: tuple[float, int, int] | None = None
    while True:
        result = algorithm.train()
        now, updates = time.perf_counter(), updates_of(result)
        collected = int(result["env_runners"].get("num_env_steps_sampled_lifetime", 0))
        if updates and first is None:
            first = now, updates, collected
        elif updates and first is not None and now - first[0] >= seconds:
            break
    since, updates, collected = now - first[0], updates - first[1], collected - first[2]
    algorithm.stop()
    return speeds(since, updates, updates * ROWS, collected, 1 if name == "IMPALA" else REUSES)


def rllib_until(name: str, goal: float, seed: int, envs: int) -> dict[str, float]:
    """With the settings of RLlib's own example, of which `envs`, environments in a runner, is 1."""
    from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig

    tuned = {
        "IMPALA": {"train_batch_size_per_learner": 500, "grad_clip": 40.0, "grad_clip_by": "global_norm", "lr": 5e-4},
        "APPO": {"circular_buffer_iterations_per_batch": 2},
    }[name]
    config = (
        rllib_config(name, 1, seed)
        .env_runners(num_env_runners=RUNNERS, num_envs_per_env_runner=envs)
        .training(vf_loss_coeff=0.05, entropy_coeff=0.0, **tuned)
        .rl_module(model_config=DefaultModelConfig(vf_share_layers=True))
    )
    started, learned, reached, env_steps = time.perf_counter(), 0.0, math.inf, 0
    algorithm = config.build_algo()
    while not learned or time.perf_counter() - learned < MOST_S:
        result = algorithm.train()
        found, now = result["env_runners"], time.perf_counter()
        learned = learned or (now if updates_of(result) else 0.0)
        env_steps = int(found.get("num_env_steps_sampled_lifetime", 0))
        if learned and found.get("episode_return_mean", 0.0) >= goal:
            reached = now
            break
    algorithm.stop()
    return times(started, learned, reached, env_steps)


# --- the comparison ---------------------------------------------------------------------------------------------------

TASKS: dict[str, dict[str, Callable[[float], dict[str, float]]]] = {
    "impala": {
        "lit_rl": lambda seconds: lit_rl("IMPALA", seconds),
        "lit_rl, compiled": lambda seconds: lit_rl("IMPALA", seconds, compile=True),
        "RLlib": lambda seconds: rllib("IMPALA", seconds, 1),
        "RLlib, learner in process": lambda seconds: rllib("IMPALA", seconds, 0),
    },
    "appo": {
        "lit_rl": lambda seconds: lit_rl("APPO", seconds, stream=AGAIN),
        "lit_rl, compiled": lambda seconds: lit_rl("APPO", seconds, stream=AGAIN, compile=True),
        "RLlib": lambda seconds: rllib("APPO", seconds, 1),
        "RLlib, learner in process": lambda seconds: rllib("APPO", seconds, 0),
    },
    "ppo": {
        "lit_rl": lambda seconds: lit_rl("APPO", seconds, PPO_LENGTH, {"num_reuses": PASSES}),
        "PPO, prefetch=1": lambda seconds: lit_rl(
            "PPO", seconds, PPO_LENGTH, {"prefetch": 1}, num_epochs=PASSES, minibatch_size=256, normalize_returns=False
        ),
        "PPO, prefetch=1, whole rollouts": lambda seconds: lit_rl(
            "PPO",
            seconds,
            PPO_LENGTH,
            {"prefetch": 1},
            num_epochs=PASSES,
            minibatch_size=RUNNERS * ENVS * PPO_LENGTH,
            normalize_returns=False,
        ),
    },
}
COMPARED = {"impala": "learned_rows_per_s", "appo": "learned_rows_per_s", "ppo": "env_steps_per_s"}
UNTIL: dict[str, dict[str, Callable[[float, int], dict[str, float]]]] = {
    task: {
        "lit_rl": lambda goal, seed, name=name: lit_rl_until(name, goal, seed),
        "RLlib": lambda goal, seed, name=name: rllib_until(name, goal, seed, 1),
        f"RLlib, {ENVS} environments a runner": lambda goal, seed, name=name: rllib_until(name, goal, seed, ENVS),
    }
    for task, name in (("impala", "IMPALA"), ("appo", "APPO"))
}


def run(python: str, script: str, task: str, system: str, *numbers: float) -> dict[str, float]:
    """One system of a benchmark in a process of its own."""
    command = [python, script, "--one", task, system, *map(str, numbers)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        sys.exit(f"{task}, {system} failed:\n{done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(line.removeprefix("RESULT "))
    return found


def ratios(runs: dict[str, list[dict[str, float]]], key: str) -> dict[str, float]:
    """How many times another system's figure lit_rl's is: the median over the rounds."""
    ours = [found[key] for found in runs["lit_rl"]]
    return {
        name: statistics.median(a / found[key] for a, found in zip(ours, rounds))
        for name, rounds in runs.items()
        if name != "lit_rl"
    }


def table(results: dict[str, dict[str, list[dict[str, float]]]]) -> str:
    """Medians of all figures, and how many times the others' speed, or time, lit_rl's is."""
    names = list(next(iter(next(iter(results.values())).values()))[0])
    lines = [f"| task | system | {' | '.join(names)} | lit_rl / it |", "|---" * (len(names) + 3) + "|"]
    for task, runs in results.items():
        of_others = ratios(runs, "seconds" if "seconds" in names else COMPARED[task])
        for system, rounds in runs.items():
            cells = [f"{statistics.median(found[name] for found in rounds):,.6g}" for name in names]
            cells.append(f"{of_others[system]:.2f}" if system in of_others else "")
            lines.append(f"| {task} | {system} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rllib-python", default=sys.executable, help="interpreter that has ray[rllib]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), help="impala and appo, if none is named")
    parser.add_argument("--systems", nargs="+", help="of each task; all, if none is named")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each system in each round")
    parser.add_argument("--time-to", type=float, metavar="RETURN", help="seconds until this mean return instead")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="of --time-to")
    parser.add_argument("--write", action="store_true", help="write docs/results/async_{speed,time_to,ppo}.json")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        import torch

        torch.set_num_threads(1)
        warnings.filterwarnings("ignore")
        task, system, *numbers = args.one
        if len(numbers) == 1:
            found = TASKS[task][system](float(numbers[0]))
        else:
            found = UNTIL[task][system](float(numbers[0]), int(numbers[1]))
        print("RESULT " + json.dumps(found), flush=True)
        return
    tasks = args.tasks or ["impala", "appo"]
    if args.time_to is not None and "ppo" in tasks:
        parser.error("--time-to: expected --tasks of impala and appo")
    rounds = args.seeds if args.time_to is not None else range(1, args.rounds + 1)
    results: dict[str, dict[str, list[dict[str, float]]]] = {}
    for task in tasks:
        systems = UNTIL[task] if args.time_to is not None else TASKS[task]
        names = [name for name in systems if not args.systems or name in args.systems or name == "lit_rl"]
        results[task] = {name: [] for name in names}
        for number in rounds:
            for name in names:
                python = args.rllib_python if name.startswith("RLlib") else sys.executable
                numbers = (args.time_to, number) if args.time_to is not None else (args.seconds,)
                results[task][name].append(run(python, __file__, task, name, *numbers))
                print(f"{task}, {number}: {name} {results[task][name][-1]}", flush=True)
    print(f"\n{table(results)}")
    if args.write:
        from measuring import write

        kind = "time_to" if args.time_to is not None else "ppo" if tasks == ["ppo"] else "speed"
        write(f"async_{kind}.json", {"tasks": results})


if __name__ == "__main__":
    main()
