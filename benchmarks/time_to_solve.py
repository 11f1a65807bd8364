"""Seconds until PPO has solved CartPole-v1: lit_rl, Stable-Baselines3 and RLlib, each with settings tuned for it.

    .venv/bin/pip install -c constraints.txt -e '.[bench]'
    .venv/bin/python benchmarks/time_to_solve.py --seeds 11 12 13

Solved is a mean return of 475 over the last 100 training episodes. The time runs from the call that trains, without
imports; evaluation is off. Each run is a process of its own, the systems take turns, and every process has one torch
thread. Settings: lit_rl those of `LIT_RL`, the best of nine that were tried with seeds 1 to 3; Stable-Baselines3 those
of rl-baselines3-zoo (`ppo.yml`, CartPole-v1); RLlib those of its tuned example
(`rllib/examples/algorithms/ppo/cartpole_ppo.py`).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

OUT = Path(__file__).resolve().parent.parent / "docs" / "results" / "time_to_solve_cartpole.json"
GOAL, EPISODES, MOST_STEPS = 475.0, 100, 400_000
LIT_RL = {
    "lr": 3e-3,
    "gamma": 0.98,
    "gae_lambda": 0.8,
    "num_epochs": 6,
    "minibatch_size": 256,
    "normalize_returns": False,
}
ROLLOUT_LENGTH = 128


def lit_rl(seed: int) -> dict[str, float]:
    import lightning as L

    from lit_rl import PPO, RolloutDataModule

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, algorithm: PPO, *_: object) -> None:
            # The first 100 episodes are far too short for it, so that the mean is never one of fewer.
            if trainer.callback_metrics.get("rollout/return_mean", 0.0) >= GOAL:
                trainer.should_stop = True

    data = RolloutDataModule(
        "CartPole-v1", num_envs_per_env_runner=8, rollout_length=ROLLOUT_LENGTH, max_env_steps=MOST_STEPS,
        return_window=EPISODES, torch_threads=1, seed=seed,
    )  # fmt: skip
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=-1, limit_val_batches=0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[Stop()],
    )  # fmt: skip
    algorithm = PPO(**LIT_RL)
    started = time.perf_counter()
    trainer.fit(algorithm, data)
    return {"seconds": time.perf_counter() - started, "env_steps": algorithm.env_steps_done}


def sb3(seed: int) -> dict[str, float]:
    import stable_baselines3
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            returns = [episode["r"] for episode in self.model.ep_info_buffer]  # the last 100
            return len(returns) < EPISODES or statistics.fmean(returns) < GOAL

    model = stable_baselines3.PPO(
        "MlpPolicy", make_vec_env("CartPole-v1", 8, seed=seed), n_steps=32, batch_size=256, gae_lambda=0.8, gamma=0.98,
        n_epochs=20, ent_coef=0.0, learning_rate=lambda left: 1e-3 * left, clip_range=lambda left: 0.2 * left,
        device="cpu", seed=seed,
    )  # fmt: skip
    started = time.perf_counter()
    model.learn(100_000, callback=Stop())
    seconds = time.perf_counter() - started
    returns = [episode["r"] for episode in model.ep_info_buffer]
    return {"seconds": seconds if statistics.fmean(returns) >= GOAL else float("inf"), "env_steps": model.num_timesteps}


def rllib(seed: int) -> dict[str, float]:
    import ray
    from ray.rllib.algorithms.ppo import PPOConfig

    ray.init(include_dashboard=False, log_to_driver=False)
    config = (
        PPOConfig()
        .environment("CartPole-v1")
        .env_runners(num_env_runners=2)
        .training(
            lr=0.0003, num_epochs=6, vf_loss_coeff=0.01,
            model={"fcnet_hiddens": [32], "fcnet_activation": "linear", "vf_share_layers": True},
        )
        .reporting(metrics_num_episodes_for_smoothing=EPISODES)
        .debugging(seed=seed)
    )  # fmt: skip
    algo = config.build_algo()
    started, steps = time.perf_counter(), 0
    while steps < MOST_STEPS:
        found = algo.train()["env_runners"]
        steps = int(found["num_env_steps_sampled_lifetime"])
        if found.get("episode_return_mean", 0.0) >= GOAL:
            return {"seconds": time.perf_counter() - started, "env_steps": steps}
    return {"seconds": float("inf"), "env_steps": steps}


SYSTEMS = {"lit_rl": lit_rl, "SB3": sb3, "RLlib, 2 runners": rllib}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[11, 12, 13])
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--write", action="store_true", help=f"write {OUT.name}")
    parser.add_argument("--one", nargs=2, metavar=("SYSTEM", "SEED"), help="run one system in this process")
    args = parser.parse_args()
    if args.one:
        import torch

        torch.set_num_threads(1)
        warnings.filterwarnings("ignore")
        print("RESULT " + json.dumps(SYSTEMS[args.one[0]](int(args.one[1]))))
        return
    results: dict[str, list[dict[str, float]]] = {name: [] for name in args.systems}
    for seed in args.seeds:
        for name in args.systems:
            done = subprocess.run(
                [sys.executable, __file__, "--one", name, str(seed)], capture_output=True, text=True, timeout=1200,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
            if line is None:
                sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
            found = json.loads(line.removeprefix("RESULT "))
            results[name].append(found)
            print(f"seed {seed}  {name:18s} {found['seconds']:7.1f} s, {found['env_steps']:.0f} env steps", flush=True)
    for name, runs in results.items():
        print(f"{name:18s} median {statistics.median(run['seconds'] for run in runs):.1f} s")
    if args.write:
        OUT.write_text(
            json.dumps(
                {"seeds": args.seeds, "lit_rl_settings": LIT_RL | {"rollout_length": ROLLOUT_LENGTH}, "runs": results},
                indent=1,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
