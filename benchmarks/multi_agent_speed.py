"""Env steps/s of PPO with several agents: lit_rl against RLlib, and what a multi-agent environment costs in lit_rl.

RLlib needs packages that lit_rl does not: see async_speed.py.

    .venv/bin/python benchmarks/multi_agent_speed.py --rllib-python ../rllib/bin/python --rounds 5 --write

The tasks "in_process" and "runners" train one policy, which all agents of `FourPoints` share, in this process and with
2 env runners. There are 8 copies of the environment in each process, 128 env steps of each copy in a rollout, 4 passes
over the rows in minibatches of 256, and 2x64 tanh units in the policy and in the critic. An env step is one call of an
environment's `step` in both libraries, and brings 4 rows, one for each agent. Minibatches are of rows in both
libraries. `learned_rows_per_env_step` counts them, repeats included: RLlib's are up to 2 % more, as it adds a row to
each piece of an episode. RLlib 2.60 takes several copies of a multi-agent environment, so it runs with 8 copies in each
process, as lit_rl does; and with one copy, in as long rollouts. Read the faster one.

The tasks "CartPole-v1" and "HalfCheetah-v5" train the same environment twice: as it is, and as the only agent of
`ReplicatedEnv`. Copies, rollouts, passes and minibatches are those of ppo_speed.py, without compilation.

Systems run in processes of their own, in turns, with one torch thread. The first two rollouts are not timed, nor is
compilation. Read the ratios, which are made within each round. Seconds of the processor are of the process that trains,
so they are there only if it collects too: what else the machine does changes them less. A round of all tasks takes 5
minutes on two idle cores.
"""

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

from async_speed import run
from four_points import PUSHES, FourPoints
from ppo_speed import TASKS as SHAPES

COPIES, LENGTH, EPOCHS, MINIBATCH = 8, 128, 4, 256
WARM_UP = 2  # rollouts
OPTIONS: dict[str, Any] = {"entropy_coef": 0.01, "normalize_returns": False}


def env_alone(seconds: float) -> float:
    """Steps/s of `FourPoints` with nothing around it."""
    env, steps = FourPoints(), 0
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds:
        env.reset(seed=steps)
        for t in range(env.length):
            env.step(dict.fromkeys(env.possible_agents, t % len(PUSHES)))
        steps += env.length
    return round(steps / (time.perf_counter() - begun), 1)


def speeds(seconds: float, cpu_seconds: float | None, env_steps: float, learned: float) -> dict[str, float]:
    """What is compared, of counts in a time."""
    found = {"env_steps_per_s": round(env_steps / seconds, 1)}
    if cpu_seconds is not None:
        found["env_steps_per_cpu_s"] = round(env_steps / cpu_seconds, 1)
    return found | {"learned_rows_per_env_step": round(learned / env_steps, 2)}


def lit_rl(
    seconds: float,
    env: Any = FourPoints,
    shape: tuple[int, int, int, int] = (COPIES, LENGTH, EPOCHS, MINIBATCH),
    num_env_runners: int = 0,
    env_kwargs: Any = None,
    compile: bool = False,
) -> dict[str, float]:
    """Speed of lit_rl's PPO.

    Args:
        seconds: that are timed.
        env: of the datamodule.
        shape: copies, env steps of each in a rollout, passes over its rows, rows of a minibatch.
        num_env_runners: 0: in this process.
        env_kwargs: of the environment.
        compile: of the algorithm. Compilation is not timed.
    """
    from measuring import Clock, quiet_trainer

    from lit_rl import PPO, RolloutDataModule

    copies, length, epochs, minibatch = shape
    data = RolloutDataModule(
        env, env_kwargs=env_kwargs or {}, num_envs_per_env_runner=copies, rollout_length=length,
        num_env_runners=num_env_runners, torch_threads=1, seed=0,
    )  # fmt: skip
    algorithm = PPO(lr=2.5e-4, num_epochs=epochs, minibatch_size=minibatch, compile=compile, **OPTIONS)
    clock = Clock(seconds, WARM_UP)
    quiet_trainer(clock).fit(algorithm, data)
    learned = clock.updates * epochs * algorithm.steps_per_pass * minibatch
    return speeds(clock.seconds, None if num_env_runners else clock.cpu_seconds, clock.env_steps, learned)


def rllib(seconds: float, copies: int, num_env_runners: int = 0) -> dict[str, float]:
    """Speed of RLlib's PPO, with `copies` of the environment in each process that collects."""
    import ray
    from ray.rllib.algorithms.ppo import PPOConfig
    from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
    from ray.rllib.env.multi_agent_env import MultiAgentEnv

    class Points(MultiAgentEnv):
        """`FourPoints` as RLlib takes it."""

        def __init__(self, config: Any = None):
            super().__init__()
            self.inner = FourPoints()
            self.agents = self.possible_agents = self.inner.possible_agents
            self.observation_spaces = {agent: self.inner.observation_space(agent) for agent in self.agents}
            self.action_spaces = {agent: self.inner.action_space(agent) for agent in self.agents}

        def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
            return self.inner.reset(seed=seed)

        def step(self, actions: dict) -> tuple[dict, dict, dict, dict, dict]:
            obs, reward, terminated, truncated, info = self.inner.step(actions)
            terminated["__all__"], truncated["__all__"] = False, all(truncated.values())
            return obs, reward, terminated, truncated, info

    ray.init(num_cpus=num_env_runners + 2, include_dashboard=False, log_to_driver=False)
    processes = max(1, num_env_runners)
    network = {
        "fcnet_hiddens": [64, 64],
        "fcnet_activation": "tanh",
        "head_fcnet_hiddens": [],
        "vf_share_layers": False,
    }
    config = (
        PPOConfig()
        .environment(Points, disable_env_checking=True)
        .multi_agent(policies={"shared"}, policy_mapping_fn=lambda *_, **__: "shared", count_steps_by="env_steps")
        .env_runners(
            num_env_runners=num_env_runners,
            num_envs_per_env_runner=copies,
            rollout_fragment_length=COPIES * LENGTH // copies,
        )
        .training(
            train_batch_size_per_learner=processes * COPIES * LENGTH, num_epochs=EPOCHS, minibatch_size=MINIBATCH,
            lr=2.5e-4, entropy_coeff=0.01, use_kl_loss=False, clip_param=0.2, lambda_=0.98, vf_loss_coeff=0.5,
            grad_clip=0.5,
        )
        .rl_module(model_config=DefaultModelConfig(**network))
        .learners(num_learners=0)
        .debugging(seed=0)
    )  # fmt: skip
    algorithm = config.build_algo()

    def now() -> tuple[float, float, int, int]:
        """After another rollout: times, env steps and learned rows so far."""
        result = algorithm.train()
        env_steps = int(result["env_runners"]["num_env_steps_sampled_lifetime"])
        rows = int(result["learners"]["shared"]["num_module_steps_trained_lifetime"])
        return time.perf_counter(), time.process_time(), env_steps, rows

    for _ in range(WARM_UP):
        first = last = now()
    while last[0] - first[0] < seconds:
        last = now()
    algorithm.stop()
    took, cpu, env_steps, learned = (after - before for after, before in zip(last, first))
    return speeds(took, None if num_env_runners else cpu, env_steps, learned)


def alone_and_replicated(env: str) -> dict[str, Callable[[float], dict[str, float]]]:
    """An environment as it is, and as the only agent of one of several."""
    shape = SHAPES[env][:4]
    return {
        "multi-agent": lambda seconds: lit_rl(
            seconds, "lit_rl.envs.multi_agent:ReplicatedEnv", shape, env_kwargs={"env": env, "num_agents": 1}
        ),
        "single-agent": lambda seconds: lit_rl(seconds, env, shape),
    }


TASKS: dict[str, dict[str, Callable[[float], dict[str, float]]]] = {
    "in_process": {
        "lit_rl": lit_rl,
        "lit_rl, compiled": lambda seconds: lit_rl(seconds, compile=True),
        "RLlib": lambda seconds: rllib(seconds, COPIES),
        "RLlib, one copy": lambda seconds: rllib(seconds, 1),
    },
    "runners": {
        "lit_rl": lambda seconds: lit_rl(seconds, num_env_runners=2),
        "lit_rl, compiled": lambda seconds: lit_rl(seconds, num_env_runners=2, compile=True),
        "RLlib": lambda seconds: rllib(seconds, COPIES, 2),
        "RLlib, one copy": lambda seconds: rllib(seconds, 1, 2),
    },
    **{env: alone_and_replicated(env) for env in SHAPES},
}


def ratios(runs: dict[str, list[dict[str, float]]], key: str = "env_steps_per_s") -> dict[str, list[float]]:
    """How many times another system's speed ours is, in each round, as "ours / other"."""
    first, *others = runs
    ours = [first, *(name for name in others if name.startswith("lit_rl"))]
    return {
        f"{our} / {name}": [round(a[key] / b[key], 3) for a, b in zip(runs[our], runs[name])]
        for our in ours
        for name in others
        if name not in ours
    }


def table(tasks: dict[str, dict[str, list[dict[str, float]]]], key: str = "env_steps_per_s") -> str:
    """Medians over the rounds: speeds, and how many times another system's the first one's is, and the compiled one's.

    Args:
        tasks: runs of each system of each task.
        key: of the speed.
    """
    lines = ["| task | system | env steps/s | the first / it | compiled / it |", "|---|---|---|---|---|"]
    for task, runs in tasks.items():
        compared = ratios(runs, key)
        for system, rounds in runs.items():
            speed = statistics.median(found[key] for found in rounds)
            pairs = [compared.get(f"{our} / {system}") for our in (next(iter(runs)), "lit_rl, compiled")]
            cells = [f"{statistics.median(pair):.2f}" if pair else "" for pair in pairs]
            lines.append(f"| {task} | {system} | {speed:,.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rllib-python", default=sys.executable, help="interpreter that has ray[rllib]")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seconds", type=float, default=15.0, help="of each system in each round")
    parser.add_argument("--write", action="store_true", help="write docs/results/multi_agent_speed.json")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        import torch

        torch.set_num_threads(1)
        warnings.filterwarnings("ignore")
        task, system, seconds = args.one
        print("RESULT " + json.dumps(TASKS[task][system](float(seconds))), flush=True)
        return
    alone = env_alone(1.0)
    print(f"FourPoints by itself: {alone:,.0f} env steps/s", flush=True)
    results: dict[str, dict[str, list[dict[str, float]]]] = {}
    for task in args.tasks:
        results[task] = {name: [] for name in TASKS[task]}
        for number in range(args.rounds):
            for name in TASKS[task]:
                python = args.rllib_python if name.startswith("RLlib") else sys.executable
                results[task][name].append(run(python, __file__, task, name, args.seconds))
                print(f"round {number + 1}  {task}, {name}: {results[task][name][-1]}", flush=True)
    print(f"\nMedians of {args.rounds} rounds\n{table(results)}")
    in_process = {task: runs for task, runs in results.items() if task != "runners"}
    print(f"\nBy the time of the processor\n{table(in_process, 'env_steps_per_cpu_s')}")
    if args.write:
        from measuring import write

        figures = {task: {"runs": runs, "ratios": ratios(runs)} for task, runs in results.items()}
        write("multi_agent_speed.json", {"env_alone_steps_per_s": alone, "tasks": figures})


if __name__ == "__main__":
    main()
