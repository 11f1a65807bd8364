"""Env steps/s of PPO on Pong's pictures: lit_rl with ale-py's vector environment against Stable-Baselines3.

    .venv/bin/pip install -c constraints.txt -e '.[atari,bench]'
    .venv/bin/python benchmarks/pong_speed.py --rounds 3

In turns, each in a process of its own: 8 environments x 128 steps of 4 x 84 x 84 bytes, 4 epochs, minibatch 256, one
NatureCNN for policy and critic, Adam 2.5e-4, two torch threads. The first rollout is not timed. Also prints how far
the resident memory grew beyond that of the imports.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable

from ppo_speed import Stopwatch, resident, sb3_ticker

ENVS, LENGTH, THREADS = 8, 128, 2
ROLLOUTS = 6


def lit_rl() -> dict[str, float]:
    import lightning as L

    from lit_rl import PPO, RolloutDataModule

    watch = Stopwatch(warm_up=1)

    class Tick(L.Callback):
        def on_train_batch_end(self, *_: object) -> None:
            watch.tick()

    watch.resident = resident()
    data = RolloutDataModule(
        "ale_py:ALE/Pong-v5", vectorization="native", num_envs_per_env_runner=ENVS, rollout_length=LENGTH,
        env_kwargs={"autoreset_mode": "SameStep", "repeat_action_probability": 0.0, "num_threads": THREADS},
        max_env_steps=ROLLOUTS * ENVS * LENGTH, torch_threads=THREADS,
    )  # fmt: skip
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=-1, limit_val_batches=0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[Tick()],
    )  # fmt: skip
    algorithm = PPO(
        lr=2.5e-4, clip=0.1, num_epochs=4, minibatch_size=256, entropy_coef=0.01, share_encoder=True,
        normalize_returns=False,
    )  # fmt: skip
    trainer.fit(algorithm, data)
    return watch.result()


def sb3() -> dict[str, float]:
    import ale_py
    import gymnasium
    import stable_baselines3
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import VecFrameStack

    gymnasium.register_envs(ale_py)
    watch = Stopwatch(warm_up=1)

    watch.resident = resident()
    kwargs = {"frameskip": 1, "repeat_action_probability": 0.0}
    envs = VecFrameStack(make_atari_env("ALE/Pong-v5", ENVS, env_kwargs=kwargs), 4)
    model = stable_baselines3.PPO(
        "CnnPolicy", envs, n_steps=LENGTH, batch_size=256, n_epochs=4, learning_rate=2.5e-4, ent_coef=0.01,
        clip_range=0.1, device="cpu",
    )  # fmt: skip
    model.learn(ROLLOUTS * ENVS * LENGTH, callback=sb3_ticker(watch))
    return watch.result()


SYSTEMS: dict[str, Callable[[], dict[str, float]]] = {"lit_rl": lit_rl, "SB3": sb3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--run", choices=list(SYSTEMS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        import torch

        warnings.filterwarnings("ignore")
        torch.set_num_threads(THREADS)
        print("RESULT " + json.dumps(SYSTEMS[args.run]()))
        return
    ratios = []
    for round_ in range(args.rounds):
        speed = {}
        for name in SYSTEMS:
            environment = os.environ | {"OMP_NUM_THREADS": str(THREADS)}
            command = [sys.executable, __file__, "--run", name]
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
            line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
            if line is None:
                sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
            result = json.loads(line.removeprefix("RESULT "))
            speed[name] = result["env_steps_per_s"]
            growth = f"memory grew by {result['growth_mb']:.0f} MB"
            print(f"round {round_ + 1}  {name:8s} {speed[name]:6.0f} env steps/s, {growth}", flush=True)
        ratios.append(speed["lit_rl"] / speed["SB3"])
    print(f"lit_rl / SB3: {statistics.median(ratios):.2f} ({' '.join(f'{ratio:.2f}' for ratio in ratios)})")


if __name__ == "__main__":
    main()
