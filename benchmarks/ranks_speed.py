"""Env steps/s of PPO on CartPole-v1 with two learner processes against one, each on a core of its own, in turns.

    .venv/bin/python benchmarks/ranks_speed.py --rounds 3

In process, no Ray: each rank steps 8 environments, 128 steps each, and learns from them for 4 epochs of minibatches of
256; `ddp` with gloo averages the gradients. Needs two idle cores.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROLLOUTS = 40


def run(devices: int, out: str) -> None:
    import lightning as L

    from lit_rl import PPO, RolloutDataModule

    os.sched_setaffinity(0, {int(os.environ.get("LOCAL_RANK", 0)) % (os.cpu_count() or 1)})

    class Clock(L.Callback):
        def __init__(self) -> None:
            self.ended: list[tuple[float, int]] = []

        def on_train_batch_end(self, trainer: L.Trainer, module: PPO, *_: object) -> None:
            self.ended.append((time.perf_counter(), module.env_steps_done))

    clock = Clock()
    data = RolloutDataModule(
        "CartPole-v1", max_env_steps=ROLLOUTS * 8 * 128 * devices, torch_threads=1, seed=0, rollouts_per_epoch=ROLLOUTS
    )
    trainer = L.Trainer(
        accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", max_epochs=-1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        callbacks=[clock],
    )  # fmt: skip
    trainer.fit(PPO(minibatch_size=256), data)
    if trainer.is_global_zero:
        (begun, before), (ended, after) = clock.ended[4], clock.ended[-1]
        Path(out).write_text(json.dumps((after - before) / (ended - begun)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs=2, metavar=("DEVICES", "OUT"), help="one run in this process")
    args = parser.parse_args()
    if args.one:
        warnings.filterwarnings("ignore")
        run(int(args.one[0]), args.one[1])
        return
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "speed"
        for number in range(args.rounds):
            speeds = []
            for devices in (1, 2):
                command = [sys.executable, __file__, "--one", str(devices), str(out)]
                subprocess.run(
                    command, check=True, capture_output=True, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}
                )
                speeds.append(json.loads(out.read_text()))
            ratios.append(speeds[1] / speeds[0])
            print(
                f"round {number + 1}: one {speeds[0]:.0f}, two {speeds[1]:.0f} env steps/s: {ratios[-1]:.2f}",
                flush=True,
            )
    print(f"median ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
