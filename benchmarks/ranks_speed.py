"""Env steps/s of PPO on CartPole-v1 with two learner processes against one, each on a core of its own, in turns.

    .venv/bin/python benchmarks/ranks_speed.py --rounds 3

In process, no Ray: each rank steps 8 environments, `--rollout-length` steps each, and learns from them for 4 epochs of
4 minibatches; `ddp` with gloo averages the gradients, 16 times in a rollout. Two runs at the same time that know
nothing of each other show how much of a second core the machine gives; what one all-reduce of the gradient takes when
processes sleep while they wait, why `lit_rl.distributed` looks for a while first. Needs two idle cores, and says which
part of their time the machine's host gave to others ("steal").
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

import torch.multiprocessing

ROLLOUTS = 40


def run(devices: int, length: int, out: str) -> None:
    import lightning as L

    from lit_rl import PPO, RolloutDataModule

    core = int(os.environ.get("FIRST_CORE", 0)) + int(os.environ.get("LOCAL_RANK", 0))
    os.sched_setaffinity(0, {core % (os.cpu_count() or 1)})

    class Clock(L.Callback):
        def __init__(self) -> None:
            self.ended: list[tuple[float, int]] = []

        def on_train_batch_end(self, trainer: L.Trainer, module: PPO, *_: object) -> None:
            self.ended.append((time.perf_counter(), module.env_steps_done))

    clock = Clock()
    data = RolloutDataModule(
        "CartPole-v1", num_envs_per_env_runner=8, rollout_length=length, max_env_steps=ROLLOUTS * 8 * length * devices,
        torch_threads=1, seed=0, rollouts_per_epoch=ROLLOUTS,
    )  # fmt: skip
    trainer = L.Trainer(
        accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", max_epochs=-1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        callbacks=[clock],
    )  # fmt: skip
    trainer.fit(PPO(num_epochs=4, minibatch_size=2 * length, normalize_returns=False), data)
    if trainer.is_global_zero:
        (begun, before), (ended, after) = clock.ended[4], clock.ended[-1]
        Path(out).write_text(json.dumps((after - before) / (ended - begun)))


def reduce(rank: int, out: str) -> None:
    """Milliseconds that averaging 9,000 numbers adds to a gradient step's worth of work, to a file."""
    from torch import distributed

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29611", "RANK": str(rank), "WORLD_SIZE": "2"}
    os.sched_setaffinity(0, {rank})
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    gradient, rows, weights = torch.ones(9_000), torch.randn(256, 64), torch.randn(64, 64)

    def seconds(reduces: bool) -> float:
        distributed.barrier()
        started = time.perf_counter()
        for _ in range(200):
            for _ in range(60):
                rows @ weights
            if reduces:
                distributed.all_reduce(gradient)
        return (time.perf_counter() - started) / 200

    added = statistics.median(seconds(True) - seconds(False) for _ in range(3))
    if rank == 0:
        Path(out).write_text(json.dumps(1000 * added))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rollout-length", type=int, default=2048)
    parser.add_argument("--one", nargs=2, metavar=("DEVICES", "OUT"), help="one run in this process")
    args = parser.parse_args()
    if args.one:
        warnings.filterwarnings("ignore")
        run(int(args.one[0]), args.rollout_length, args.one[1])
        return
    ratios: list[list[float]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            found, stolen = zip(*(speeds(devices, args.rollout_length, folder) for devices in ([1], [2], [1, 1])))
            one, ranks, apart = map(sum, found)
            ratios.append([ranks / one, apart / one])
            print(
                f"round {number + 1}: one {one:.0f}, two ranks {ranks:.0f} env steps/s: {ranks / one:.2f}; "
                f"two that know nothing of each other {apart:.0f}: {apart / one:.2f}; "
                f"steal {', '.join(f'{part:.0%}' for part in stolen)}",
                flush=True,
            )
        torch.multiprocessing.spawn(reduce, (f"{folder}/reduce",), nprocs=2)
        print(f"an all-reduce takes {json.loads(Path(folder, 'reduce').read_text()):.1f} ms")
    of_ranks, of_apart = (statistics.median(found) for found in zip(*ratios))
    print(f"median ratio: two ranks {of_ranks:.2f}, two runs apart {of_apart:.2f}")


def speeds(devices: list[int], length: int, folder: str) -> tuple[list[float], float]:
    """Env steps/s of runs with so many ranks, all at the same time, from the first core on; and the steal meanwhile."""
    before = processor_time()
    outs = [Path(folder) / f"speed-{i}" for i in range(len(devices))]
    runs = [
        subprocess.Popen(
            [sys.executable, __file__, "--rollout-length", str(length), "--one", str(count), str(out)], cwd=folder,
            stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1", "FIRST_CORE": str(i)},
        )
        for i, (count, out) in enumerate(zip(devices, outs))
    ]  # fmt: skip
    for process in runs:
        if process.wait():
            sys.exit(f"a run ended with code {process.returncode}")
    total, stolen = (after - begun for after, begun in zip(processor_time(), before))
    return [json.loads(out.read_text()) for out in outs], stolen / total


def processor_time() -> tuple[int, int]:
    """Of all cores so far, in ticks: in all, and taken by the machine's host while there was something to run."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    return sum(ticks), ticks[7]


if __name__ == "__main__":
    main()
