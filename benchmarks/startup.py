"""Seconds from `lit-rl fit` to its first training batch, against `import lightning`, each in a new process, in turns.

.venv/bin/python benchmarks/startup.py
"""

import statistics
import subprocess
import sys
import tempfile
import time

ROUNDS = 5
IMPORT = "import lightning"
FIT = """
import os, time
import lightning as L
from lit_rl import PPO, cli
def stop(self, *args): print("FIRST BATCH", time.time(), flush=True); os._exit(0)
PPO.training_step = stop
cli.main(["fit", "--config", "ppo_cartpole"])
"""


def seconds(code: str, folder: str) -> float:
    started = time.time()
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    ended = time.time()
    for line in done.stdout.splitlines():
        if "FIRST BATCH" in line:
            ended = float(line.split()[-1])
    return ended - started


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(ROUNDS):
            rows.append((seconds(IMPORT, folder), seconds(FIT, folder)))
            print("import lightning {:.2f} s, lit-rl fit to its first batch {:.2f} s".format(*rows[-1]), flush=True)
    one, two = (statistics.median(column) for column in zip(*rows))
    print(f"median: {one:.2f} s and {two:.2f} s, ratio {two / one:.2f}")


if __name__ == "__main__":
    main()
