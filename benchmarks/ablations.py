"""Rainbow on CartPole-v1 with each of its six parts alone switched off.

    .venv/bin/python benchmarks/ablations.py --folder runs/ablations

Each is `recipes/rainbow_cartpole.yaml` with seed 1, a budget of 100,000 env steps, a slower target network (`tau`
0.005: with the recipe's 0.01 values run away where nothing bounds them, which the distribution does) and one option
more. The last checkpoint plays 100 greedy episodes. Writes `docs/results/rainbow_ablations.json`, also after part of
the runs; with `--folder` those that were trained there before are judged without training them again.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
from results import OUT, ROOT, commit

from lit_rl import load_policy
from lit_rl.envs.make import EnvConfig
from lit_rl.evaluation.episodes import play

OPTIONS = {
    "none": [],
    "double": ["--model.double", "false"],
    "dueling": ["--model.dueling", "false"],
    "n_step": ["--data.n_step", "1"],
    "prioritized": ["--data.prioritized", "false"],
    "distributional": ["--model.distributional", "null"],
    "noisy": ["--model.noisy", "false"],
}
BUDGET, SEED, TAU = 100_000, 1, 0.005


def train(folder: Path, options: list[str]) -> None:
    command = [
        sys.executable, "-m", "lit_rl", "fit", "--config", str(ROOT / "recipes" / "rainbow_cartpole.yaml"),
        "--seed_everything", str(SEED), "--data.max_env_steps", str(BUDGET), "--model.tau", str(TAU),
        "--trainer.enable_progress_bar", "false",
        "--trainer.logger.init_args.save_dir", str(folder), "--trainer.logger.init_args.name", "run", *options,
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    (folder / "commit").write_text(commit())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--parts", nargs="+", choices=list(OPTIONS), default=list(OPTIONS))
    args = parser.parse_args()
    out = OUT / "rainbow_ablations.json"
    found = json.loads(out.read_text())["without"] if out.exists() else {}
    seeds = np.random.SeedSequence([SEED, 20_000]).generate_state(100).tolist()
    for part in args.parts:
        folder = (args.folder / part).resolve()
        if not (folder / "commit").exists():
            folder.mkdir(parents=True, exist_ok=True)
            train(folder, OPTIONS[part])
        policy = load_policy(folder / "run" / "version_0" / "checkpoints" / "last.ckpt")
        returns = [episode.return_ for episode in play(EnvConfig("CartPole-v1"), policy, seeds)]
        found[part] = {"return_mean": statistics.mean(returns), "commit": (folder / "commit").read_text()}
        print(f"without {part}: {found[part]['return_mean']:.1f}", flush=True)
        command = "benchmarks/ablations.py"
        results = {"command": command, "seed": SEED, "env_steps": BUDGET, "tau": TAU, "episodes": 100, "without": found}
        out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
