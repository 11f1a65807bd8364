"""DreamerV3's training returns in the form in which its author publishes his: docs/results/scores.

    .venv/bin/python benchmarks/scores.py

Reads docs/results/<recipe>.json of every recipe of DreamerV3 and writes `<suite>-lit_rl_dreamerv3.json.gz`, as the
files in github.com/danijar/dreamerv3/scores: a list of one dict for each seed,

    {"task": "dmc_cartpole_swingup", "method": "lit_rl_dreamerv3", "seed": 1, "xs": [1000, ...], "ys": [31.4, ...]}

`ys` are mean returns of episodes while training, `xs` environment frames: env steps times `action_repeat`. Suites and
tasks are the author's for dm_control ("dmc_proprio", "dmc_..."); all other recipes are the suite "gym". Nothing is
trained. Read a file with `pandas.read_json`.
"""

import gzip
import json
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
METHOD = "lit_rl_dreamerv3"


def suite_and_task(recipe: str, data: dict[str, Any]) -> tuple[str, str]:
    """What the scores of a recipe's environment are called."""
    if data["env"].startswith("lit_rl.envs.dm_control:"):
        return "dmc_proprio", f"dmc_{data['env_kwargs']['domain']}_{data['env_kwargs']['task']}"
    return "gym", f"gym_{recipe.removeprefix('dreamer_')}"


def scores(results: Path = RESULTS) -> dict[str, list[dict[str, Any]]]:
    """The runs of each suite, by its name, of all recipes of DreamerV3 that have a result."""
    suites: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((ROOT / "recipes").glob("dreamer_*.yaml")):
        measured = results / f"{path.stem}.json"
        if not measured.exists():
            continue
        data = yaml.safe_load(path.read_text())["data"]["init_args"]
        frames = data.get("env_kwargs", {}).get("action_repeat", 1)  # of an env step
        suite, task = suite_and_task(path.stem, data)
        for run in json.loads(measured.read_text())["runs"]:
            env_steps, returns = zip(*run["curve"]["rollout/return_mean"])
            suites.setdefault(suite, []).append(
                {
                    "task": task,
                    "method": METHOD,
                    "seed": run["seed"],
                    "xs": [frames * int(x) for x in env_steps],
                    "ys": list(returns),
                }
            )
    return suites


def write(results: Path = RESULTS) -> list[Path]:
    """The files that were written to the folder `scores` of the results."""
    folder = results / "scores"
    folder.mkdir(exist_ok=True)
    paths = []
    for suite, runs in scores(results).items():
        paths.append(folder / f"{suite}-{METHOD}.json.gz")
        paths[-1].write_bytes(gzip.compress(json.dumps(runs).encode(), mtime=0))  # the same bytes for the same runs
    return paths


def read(path: Path) -> list[dict[str, Any]]:
    """The runs of a file."""
    return json.loads(gzip.decompress(path.read_bytes()))


def main() -> None:
    for path in write():
        print(f"{path.relative_to(ROOT)}: {len(read(path))} runs")


if __name__ == "__main__":
    main()
