"""A recipe on CartPole-v1 with each of its algorithm's parts alone switched off.

    .venv/bin/python benchmarks/ablations.py rainbow_cartpole --folder runs/ablations
    .venv/bin/python benchmarks/ablations.py dreamer_cartpole --folder runs/ablations

Each is the recipe with seed 1, another budget, and one option more. Rainbow's is 100,000 env steps, with a slower
target network (`tau` 0.005: with the recipe's 0.01 values run away where nothing bounds them, which the distribution
does); DreamerV3's is 10,000. DreamerV3 without "last_rows" learns nothing from the rows that only show how an episode
ended. The last checkpoint plays 100 greedy episodes. Writes `docs/results/<algorithm>_ablations.json`, also after part
of the runs; with `--folder` those that were trained there before are judged without training them again.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from results import OUT, ROOT, commit
from tensordict import TensorDict

from lit_rl import DreamerV3, load_policy
from lit_rl.envs.make import EnvConfig
from lit_rl.evaluation.episodes import play
from lit_rl.modules.dreamer_v3.world_model import WorldModel
from lit_rl.policy import LatentPolicy
from lit_rl.spec import EnvSpec

SEED = 1
ALWAYS = {
    "rainbow_cartpole": {"data.max_env_steps": 100_000, "model.tau": 0.005},
    "dreamer_cartpole": {"data.max_env_steps": 10_000},
}
WITHOUT: dict[str, dict[str, list[str]]] = {
    "rainbow_cartpole": {
        "none": [],
        "double": ["--model.double", "false"],
        "dueling": ["--model.dueling", "false"],
        "n_step": ["--data.n_step", "1"],
        "prioritized": ["--data.prioritized", "false"],
        "distributional": ["--model.distributional", "null"],
        "noisy": ["--model.noisy", "false"],
    },
    "dreamer_cartpole": {
        "none": [],
        "replay_value": ["--model.replay_value_coef", "0"],
        "free_bits": ["--model.free_bits", "0"],
        "return_normalization": ["--model.normalize_returns", "false"],
        "last_rows": ["--model", "ablations.WithoutLastRows"],
    },
}


class WithoutLastRows(DreamerV3):
    """Its world model learns nothing from the rows that hold an episode's final observation, reward and end."""

    def build(self, spec: EnvSpec) -> None:
        super().build(spec)
        whole, self.model = self.model, ModelWithoutLastRows(self.policy, self.network_size)
        self.model.load_state_dict(whole.state_dict())  # as the same seed makes it


class ModelWithoutLastRows(WorldModel):
    def losses(self, policy: LatentPolicy, batch: TensorDict, **options: Any) -> Any:
        losses, latents, features = super().losses(policy, batch, **options)
        learned = (~batch["is_last"]).float()
        return {name: loss * learned for name, loss in losses.items()}, latents, features


def train(recipe: str, folder: Path, options: list[str]) -> None:
    always = [word for name, value in ALWAYS[recipe].items() for word in (f"--{name}", str(value))]
    command = [
        sys.executable, "-m", "lit_rl", "fit", "--config", str(ROOT / "recipes" / f"{recipe}.yaml"),
        "--seed_everything", str(SEED), "--trainer.enable_progress_bar", "false",
        "--trainer.logger.init_args.save_dir", str(folder), "--trainer.logger.init_args.name", "run", *options, *always,
    ]  # fmt: skip
    here = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": here})
    (folder / "commit").write_text(commit())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=list(WITHOUT))
    parser.add_argument("--folder", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--parts", nargs="+", help="those of the recipe's algorithm; all by default")
    args = parser.parse_args()
    parts = WITHOUT[args.recipe]
    if unknown := set(args.parts or ()) - parts.keys():
        parser.error(f"--parts {' '.join(sorted(unknown))}: expected some of {', '.join(parts)}")
    out = OUT / f"{args.recipe.partition('_')[0]}_ablations.json"
    found = json.loads(out.read_text())["without"] if out.exists() else {}
    seeds = np.random.SeedSequence([SEED, 20_000]).generate_state(100).tolist()
    for part in args.parts or parts:
        folder = (args.folder / args.recipe / part).resolve()
        if not (folder / "commit").exists():
            folder.mkdir(parents=True, exist_ok=True)
            train(args.recipe, folder, parts[part])
        policy = load_policy(folder / "run" / "version_0" / "checkpoints" / "last.ckpt")
        returns = [episode.return_ for episode in play(EnvConfig("CartPole-v1"), policy, seeds)]
        found[part] = {"return_mean": statistics.mean(returns), "commit": (folder / "commit").read_text()}
        print(f"without {part}: {found[part]['return_mean']:.1f}", flush=True)
        results = {
            "command": f"benchmarks/ablations.py {args.recipe}", "seed": SEED, "options": ALWAYS[args.recipe],
            "episodes": 100, "without": found,
        }  # fmt: skip
        out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
