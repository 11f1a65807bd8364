"""Env steps/s of PPO: lit_rl against Stable-Baselines3, RLlib and a single-file loop.

    .venv/bin/pip install -c constraints.txt -e '.[bench]'
    .venv/bin/python benchmarks/ppo_speed.py --rounds 5
    .venv/bin/python benchmarks/ppo_speed.py --env HalfCheetah-v5 --systems lit_rl "lit_rl, compiled" SB3

Every system runs in a process of its own, one after the other, several rounds, with the same network (2x64 tanh) and
hyper-parameters: those of `TASKS`, Adam 2.5e-4, one torch thread per process. The first rollouts are not timed, nor is
compilation, which is reported apart. Read the ratios: these machines are noisy.
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
from typing import Any

# Environments, steps of each in a rollout, passes, rows of a minibatch, rollouts before and while time is taken.
TASKS = {"CartPole-v1": (8, 128, 4, 256, 10, 50), "HalfCheetah-v5": (1, 2048, 10, 64, 2, 8)}
ENV = os.environ.get("PPO_SPEED_ENV", "CartPole-v1")  # for the processes this one starts
ENVS, LENGTH, EPOCHS, MINIBATCH, WARM_UP, TIMED = TASKS[ENV]
ROLLOUT = ENVS * LENGTH


class Stopwatch:
    """Counts rollouts; timed from the end of the warm-up."""

    def __init__(self, warm_up: int = WARM_UP) -> None:
        self.rollouts = 0
        self.resident = 0
        self.warm_up = warm_up

    def tick(self) -> None:
        self.rollouts += 1
        if self.rollouts == self.warm_up:
            self.started = time.perf_counter()
        self.ended = time.perf_counter()

    def result(self) -> dict[str, float]:
        steps = (self.rollouts - self.warm_up) * ROLLOUT
        return {"env_steps_per_s": steps / (self.ended - self.started), "growth_mb": (resident() - self.resident) / 1e6}


def resident() -> int:
    import psutil

    return psutil.Process().memory_info().rss


def lit_rl(
    num_env_runners: int = 0, prefetch: int = 0, vectorization: str = "sync", compile: bool = False
) -> dict[str, float]:
    import lightning as L

    from lit_rl import PPO, RolloutDataModule

    watch = Stopwatch()

    class Tick(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
            watch.tick()
            updates.append(float(trainer.callback_metrics["time/update_s"]))

    updates: list[float] = []
    watch.resident = resident()
    data = RolloutDataModule(
        ENV, num_envs_per_env_runner=ENVS, rollout_length=LENGTH, num_env_runners=num_env_runners,
        prefetch=prefetch, vectorization=vectorization, max_env_steps=(WARM_UP + TIMED) * ROLLOUT, torch_threads=1,
    )  # fmt: skip
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=-1, limit_val_batches=0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[Tick()],
    )  # fmt: skip
    algorithm = PPO(
        lr=2.5e-4, num_epochs=EPOCHS, minibatch_size=MINIBATCH, entropy_coef=0.01, normalize_returns=False,
        compile=compile,
    )  # fmt: skip
    trainer.fit(algorithm, data)
    compilation = {"compilation_s": updates[0] - statistics.median(updates)} if compile else {}
    return watch.result() | compilation


def sb3_ticker(watch: Stopwatch) -> Any:
    """A callback of Stable-Baselines3's that counts rollouts."""
    from stable_baselines3.common.callbacks import BaseCallback

    class Tick(BaseCallback):
        def _on_rollout_start(self) -> None:
            if self.num_timesteps:
                watch.tick()

        def _on_training_end(self) -> None:
            watch.tick()

        def _on_step(self) -> bool:
            return True

    return Tick()


def sb3() -> dict[str, float]:
    import stable_baselines3
    from stable_baselines3.common.env_util import make_vec_env

    watch = Stopwatch()

    watch.resident = resident()
    model = stable_baselines3.PPO(
        "MlpPolicy", make_vec_env(ENV, ENVS), n_steps=LENGTH, batch_size=MINIBATCH, n_epochs=EPOCHS,
        learning_rate=2.5e-4, ent_coef=0.01, device="cpu",
    )  # fmt: skip
    model.learn((WARM_UP + TIMED) * ROLLOUT, callback=sb3_ticker(watch))
    return watch.result()


def rllib(num_env_runners: int) -> dict[str, float]:
    import ray
    from ray.rllib.algorithms.ppo import PPOConfig

    ray.init(include_dashboard=False, log_to_driver=False)
    watch = Stopwatch()
    config = (
        PPOConfig()
        .environment("CartPole-v1")
        .env_runners(num_env_runners=num_env_runners, num_envs_per_env_runner=ENVS // max(1, num_env_runners))
        .training(
            train_batch_size_per_learner=ROLLOUT, num_epochs=4, minibatch_size=256, lr=2.5e-4, entropy_coeff=0.01,
            use_kl_loss=False, clip_param=0.2, lambda_=0.95, vf_loss_coeff=0.5, grad_clip=0.5,
            model={"fcnet_hiddens": [64, 64], "fcnet_activation": "tanh", "vf_share_layers": False},
        )
        .learners(num_learners=0)
    )  # fmt: skip
    algo = config.build_algo()
    watch.resident = resident()
    for _ in range(WARM_UP + TIMED // 2):
        algo.train()
        watch.tick()
    algo.stop()
    return watch.result()


def single_file() -> dict[str, float]:
    """PPO as a careful person writes it in one file: eager torch, no library."""
    import gymnasium as gym
    import numpy as np
    import torch
    from torch import nn
    from torch.distributions import Categorical

    watch = Stopwatch()
    watch.resident = resident()
    make = gym.vector.SyncVectorEnv
    envs = make([lambda: gym.make("CartPole-v1")] * ENVS, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)

    def net(out: int, gain: float) -> nn.Sequential:
        layers = [nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, out)]
        for layer, g in zip(layers[::2], (2**0.5, 2**0.5, gain)):
            nn.init.orthogonal_(layer.weight, g)
            nn.init.zeros_(layer.bias)
        return nn.Sequential(*layers)

    actor, critic = net(2, 0.01), net(1, 1.0)
    parameters = [*actor.parameters(), *critic.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=2.5e-4, eps=1e-5)
    obs_b, act_b = torch.zeros(LENGTH, ENVS, 4), torch.zeros(LENGTH, ENVS, dtype=torch.long)
    logp_b, rew_b, done_b, val_b = (torch.zeros(LENGTH, ENVS) for _ in range(4))
    obs = torch.as_tensor(envs.reset(seed=1)[0])
    done = torch.zeros(ENVS)
    for _ in range(WARM_UP + TIMED):
        for t in range(LENGTH):
            obs_b[t], done_b[t] = obs, done
            with torch.no_grad():
                dist = Categorical(logits=actor(obs))
                action = dist.sample()
                val_b[t] = critic(obs).squeeze(-1)
            act_b[t], logp_b[t] = action, dist.log_prob(action)
            next_obs, reward, terminated, truncated, _ = envs.step(action.numpy())
            rew_b[t] = torch.as_tensor(reward, dtype=torch.float32)
            obs, done = torch.as_tensor(next_obs), torch.as_tensor(np.logical_or(terminated, truncated)).float()
        with torch.no_grad():
            next_value, adv, last = critic(obs).squeeze(-1), torch.zeros_like(rew_b), torch.zeros(ENVS)
            for t in reversed(range(LENGTH)):
                alive = 1 - (done if t == LENGTH - 1 else done_b[t + 1])
                following = next_value if t == LENGTH - 1 else val_b[t + 1]
                delta = rew_b[t] + 0.99 * following * alive - val_b[t]
                adv[t] = last = delta + 0.99 * 0.95 * alive * last
            ret = adv + val_b
        flat = [x.reshape(ROLLOUT, *x.shape[2:]) for x in (obs_b, act_b, logp_b, adv, ret)]
        for _ in range(4):
            for index in torch.randperm(ROLLOUT).split(256):
                o, a, old, ad, re = (x[index] for x in flat)
                dist = Categorical(logits=actor(o))
                ratio = (dist.log_prob(a) - old).exp()
                ad = (ad - ad.mean()) / (ad.std() + 1e-8)
                pg = torch.max(-ad * ratio, -ad * ratio.clamp(0.8, 1.2)).mean()
                loss = pg + 0.25 * (critic(o).squeeze(-1) - re).pow(2).mean() - 0.01 * dist.entropy().mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 0.5)
                optimizer.step()
        watch.tick()
    return watch.result()


SYSTEMS: dict[str, Callable[[], dict[str, float]]] = {
    "lit_rl": lit_rl,
    "lit_rl, native vector env": lambda: lit_rl(vectorization="native"),
    "lit_rl, compiled": lambda: lit_rl(compile=True),
    "lit_rl, compiled, native": lambda: lit_rl(compile=True, vectorization="native"),
    "lit_rl, 1 runner, prefetch": lambda: lit_rl(num_env_runners=1, prefetch=1),
    "lit_rl, compiled, 1 runner, prefetch": lambda: lit_rl(num_env_runners=1, prefetch=1, compile=True),
    "SB3": sb3,
    "single file": single_file,
    "RLlib, 0 runners": lambda: rllib(0),
    "RLlib, 2 runners": lambda: rllib(2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--env", choices=list(TASKS), default=ENV)
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--run", choices=list(SYSTEMS), help=argparse.SUPPRESS)
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--show", help="run nothing: print the table of such a file")
    args = parser.parse_args()
    if not args.run and args.env != "CartPole-v1" and not set(args.systems) <= {"lit_rl", "lit_rl, compiled", "SB3"}:
        parser.error(f'--env {args.env}: expected --systems of lit_rl, "lit_rl, compiled" and SB3')
    if args.show:
        with open(args.show) as file:
            report(json.load(file))
        return
    if args.run:
        import torch

        warnings.filterwarnings("ignore")
        torch.set_num_threads(1)
        print("RESULT " + json.dumps(SYSTEMS[args.run]()))
        return
    results: dict[str, list[dict[str, float]]] = {name: [] for name in args.systems}
    for round_ in range(args.rounds):
        for name in args.systems:
            command = [sys.executable, __file__, "--run", name]
            environment = os.environ | {
                "PPO_SPEED_ENV": args.env,
                "OMP_NUM_THREADS": "1",
                "MKL_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
            }
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
            line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
            if line is None:
                sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
            results[name].append(json.loads(line.removeprefix("RESULT ")))
            print(f"round {round_ + 1}  {name:36s} {results[name][-1]['env_steps_per_s']:8.0f} env steps/s", flush=True)
    report(results)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(results, file, indent=1)


def report(results: dict[str, list[dict[str, float]]]) -> None:
    """Medians over rounds. A ratio is taken within its round, whose systems ran in the same minutes."""
    speed = {name: [row["env_steps_per_s"] for row in rows] for name, rows in results.items()}
    sb3 = speed.get("SB3")
    rllib = [max(figures) for figures in zip(*(v for name, v in speed.items() if name.startswith("RLlib")))] or None
    print(f"\n{'medians of rounds':36s} env steps/s   / SB3   / RLlib's best   growth of resident memory, MB")
    for name, figures in speed.items():
        growth = statistics.median(row["growth_mb"] for row in results[name])
        compilation = [row["compilation_s"] for row in results[name] if "compilation_s" in row]
        if compilation and "lit_rl" in speed:  # env steps after which it is made up for
            seconds, ours = statistics.median(compilation), statistics.median(speed["lit_rl"])
            pays = seconds / (1 / ours - 1 / statistics.median(figures))
            print(f"{name}: {seconds:.0f} s of compilation, made up for after {pays:,.0f} env steps")
        ratios = f"{_ratio(figures, sb3)} {_ratio(figures, rllib):>16s}"
        print(f"{name:36s} {statistics.median(figures):11.0f} {ratios} {growth:12.0f}")


def _ratio(figures: list[float], others: list[float] | None) -> str:
    return "      -" if others is None else f"{statistics.median(a / b for a, b in zip(figures, others)):7.2f}"


if __name__ == "__main__":
    main()
