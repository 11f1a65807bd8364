"""Learning results: one recipe over several seeds, judged by its last checkpoint.

    .venv/bin/python benchmarks/results.py ppo_cartpole --seeds 1 2 3 4 5

Each seed is `lit-rl fit --config recipes/<recipe>.yaml --seed_everything <seed>` in a process of its own. Its last
checkpoint (not its best) then plays 100 greedy episodes, with seeds that no run has seen. Writes
`docs/results/<recipe>.json` (every seed's figure, the command, the commit, versions) and `docs/results/<recipe>.png`.
With `--folder` the runs are kept (`<folder>/<recipe>/seed_<seed>`). A seed that was trained there before is judged
without training it again, and one that was stopped goes on from its newest checkpoint. `bars.yaml` has each recipe's
bar: what a seed is expected to reach. After a change of it

    .venv/bin/python benchmarks/results.py --bars

counts the seeds below the bars anew, from the written files, without training.

Recipes that learn from recorded data count updates in the place of env steps. Their data sets are made by

    .venv/bin/python benchmarks/offline_data.py

With `--data` such a recipe learns from another of them, for comparison, and is not judged by its bar:
`bc_pendulum --data pendulum_mixed` writes `docs/results/bc_pendulum_from_pendulum_mixed.json`.

A policy that plays a game against itself has a return of 0 whatever it has learned. Recipes of games, those in `GAMES`,
are judged by games against random legal actions (`--episodes 500`), of one player, or of each team. In the place of
`return_mean` they have the percentage of games that are not lost, or won: the least of all teams'.
"""

import argparse
import contextlib
import csv
import importlib.metadata
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gallery
import numpy as np
import torch
import yaml
from agent_returns import returns_of
from games import Match, play_games

from lit_rl import Policy, Random, load_policy
from lit_rl.envs.make import EnvConfig
from lit_rl.evaluation.episodes import play
from lit_rl.spec import MultiAgentSpec

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "results"
FOX = {"fox": "lit_rl.envs.coins:Fox"}
GAMES = {  # recipes that are judged by games against random actions, and by what counts in them
    "ppo_tictactoe": ("not lost", [Match("player_1")]),
    "mixed_coins": ("won", [Match("red_*", "red", "blue_*", FOX), Match("blue_*", "blue", "red_*", FOX)]),
}
BARS: dict[str, float | None] = yaml.safe_load((ROOT / "benchmarks" / "bars.yaml").read_text())


def commit() -> str:
    """What the code is."""
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    status = ["git", "status", "--porcelain", "-uno", "--", ".", ":!docs/results"]
    dirty = subprocess.run(status, cwd=ROOT, capture_output=True, text=True).stdout
    return head + (" with uncommitted changes" if dirty else "")


def train(recipe: str, seed: int, folder: Path, data: str | None = None) -> None:
    """Train one seed, on the recipe's own data or on another set, and note the commits and the time it took.

    It goes on from the newest checkpoint, if it was stopped before.
    """
    command = [
        sys.executable, "-m", "lit_rl", "fit", "--config", str(ROOT / "recipes" / f"{recipe}.yaml"),
        "--seed_everything", str(seed), "--trainer.enable_progress_bar", "false",
        "--trainer.logger.init_args.save_dir", str(folder), "--trainer.logger.init_args.name", f"seed_{seed}",
    ]  # fmt: skip
    if data is not None:
        command += ["--data.paths", str(ROOT / "runs" / "data" / data)]
    run, started = folder / f"seed_{seed}", time.perf_counter()
    checkpoints = [path for name in ("last", "interrupted") for path in run.glob(f"version_*/checkpoints/{name}.ckpt")]
    if checkpoints:
        command += ["--ckpt_path", str(max(checkpoints, key=lambda path: path.stat().st_mtime))]
    done = subprocess.run(command, capture_output=True, text=True)
    notes = run / "parts.json"
    parts = json.loads(notes.read_text()) if notes.exists() else []
    parts.append({"commit": commit(), "wall_s": round(time.perf_counter() - started, 1)})
    if run.exists():
        notes.write_text(json.dumps(parts))
    if done.returncode:
        sys.exit(
            f"seed {seed} failed, or was stopped; with --folder it goes on in the next call:\n{done.stderr[-4000:]}"
        )
    trained = {"commit": ", ".join(dict.fromkeys(part["commit"] for part in parts))}
    trained["wall_s"] = round(sum(part["wall_s"] for part in parts), 1)
    (run / "trained.json").write_text(json.dumps(trained | ({"parts": len(parts)} if len(parts) > 1 else {})))


def read_metrics(run: Path, clock: str) -> list[dict[str, str]]:
    """The rows of a run's logs; where it went on from a checkpoint, what came after that the first time is left out."""
    rows: list[dict[str, str]] = []
    for version in sorted(run.glob("version_*"), key=_number):
        if (version / "metrics.csv").exists():
            with (version / "metrics.csv").open() as file:
                more = list(csv.DictReader(file))
            first = min((float(row[clock]) for row in more if row[clock]), default=math.inf)
            rows = [row for row in rows if row[clock] and float(row[clock]) < first] + more
    return rows


def _number(version: Path) -> int:
    return int(version.name.rpartition("_")[2])


def run_seed(recipe: str, seed: int, folder: Path, num_episodes: int, set_: str | None = None) -> dict[str, Any]:
    """One seed's figures and its curve; trains it if that is not done, on its own data or on another set."""
    trained = folder / f"seed_{seed}" / "trained.json"
    if not trained.exists():
        train(recipe, seed, folder, set_)
    run = max(trained.parent.glob("version_*"), key=_number)
    data = yaml.safe_load((ROOT / "recipes" / f"{recipe}.yaml").read_text())["data"]["init_args"]
    env = env_config(data)
    seeds = np.random.SeedSequence([seed, 20_000]).generate_state(num_episodes).tolist()
    checkpoint = run / "checkpoints" / "last.ckpt"
    games: dict[str, dict[str, int]] = {}
    if recipe in GAMES:
        returns, games = shares(checkpoint, env, *GAMES[recipe], seeds)
    else:
        returns = [episode.return_ for episode in play(env, load_policy(checkpoint), seeds)]
    clock = clock_of(data)
    rows = read_metrics(trained.parent, clock)
    curve = {
        name: points
        for name in curve_names(recipe)
        if (points := [[float(row[clock]), float(row[name])] for row in rows if row.get(name)])
    }
    return {
        "seed": seed,
        "return_mean": round(statistics.mean(returns), 3),
        "return_std": round(statistics.pstdev(returns), 3),
        "return_min": min(returns),
        **({"games": games} if games else {}),
        clock: int(max(float(row[clock]) for row in rows if row[clock])),
        **({} if clock == "updates" else {"training_return_mean": curve[curve_names(recipe)[0]][-1][1]}),
        **json.loads(trained.read_text()),
        "curve": {name: _thin(points) for name, points in curve.items()},
    }


def shares(
    checkpoint: Path, env: EnvConfig, counts: str, matches: Sequence[Match], seeds: Sequence[int]
) -> tuple[list[float], dict[str, dict[str, int]]]:
    """100 for each game that counts, else 0, of the worst team; and what came of the games of each."""
    lists, games = [], {}
    for match in matches:
        played = play_games(env, load_policy(checkpoint, policy=match.policy), match, seeds)
        lists.append([100.0 * (x > 0 if counts == "won" else x >= 0) for x in played.returns])
        games[match.agent] = played.counts
    return min(lists, key=sum), games


def curve_names(recipe: str) -> tuple[str, str]:
    """The logged names of the returns of training and of evaluation."""
    player = player_of(recipe)
    return f"rollout/return_mean{player and f'/{player}'}", f"eval/return_mean{player and f'/{player}'}"


def player_of(recipe: str) -> str:
    """The agent whose returns are the curve of a game, "" where the sum of all is."""
    matches = GAMES[recipe][1] if recipe in GAMES else []
    return matches[0].agent if len(matches) == 1 else ""


def clock_of(data: dict[str, Any]) -> str:
    """What a recipe's datamodule counts: "env_steps", or "updates" where it reads recorded data."""
    return "updates" if "max_updates" in data else "env_steps"


def env_config(data: dict[str, Any]) -> EnvConfig:
    """The environment of a recipe's datamodule."""
    wrappers, vectorization = tuple(data.get("wrappers") or ()), data.get("vectorization", "sync")
    where = data["evaluation"] if clock_of(data) == "updates" else data
    return EnvConfig(where["env"], where.get("env_kwargs") or {}, wrappers, vectorization)


def play_randomly(env: EnvConfig) -> dict[str, Any]:
    """The return of a policy that chooses among all (legal) actions alike; with several agents, of all of them."""
    seeds, spec = np.random.SeedSequence([0, 30_000]).generate_state(100).tolist(), env.try_out()
    if isinstance(spec, MultiAgentSpec):
        returns = returns_of(env, Random(), seeds).tolist()
    else:
        policy = Policy(spec)
        torch.nn.init.zeros_(policy.head.weight)
        returns = [episode.return_ for episode in play(env, policy, seeds, deterministic=False)]
    return {
        "return_mean": round(statistics.mean(returns), 3),
        "return_std": round(statistics.pstdev(returns), 3),
        "episodes": len(returns),
    }


def with_bar(result: dict[str, Any]) -> dict[str, Any]:
    """A result with its recipe's bar, and the number of seeds below it, after the median."""
    bar = BARS[result["recipe"]]
    below = None if bar is None else sum(run["return_mean"] < bar for run in result["runs"])
    judged: dict[str, Any] = {}
    for name, value in result.items():
        if name not in ("bar", "below_bar"):
            judged[name] = value
        if name == "median":
            judged |= {"bar": bar, "below_bar": below}
    return judged


def write(result: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(with_bar(result), indent=1) + "\n")


def write_bars(folder: Path = OUT) -> None:
    """Judge all recipes' results that are in a folder by the bars of today."""
    for recipe in BARS:
        path = folder / f"{recipe}.json"
        if path.exists():
            write(json.loads(path.read_text()), path)


def _thin(points: list[list[float]], most: int = 100) -> list[list[float]]:
    step = max(1, len(points) // most)
    kept = points[::step] if points[-1:] == points[::step][-1:] else [*points[::step], *points[-1:]]
    return [[steps, round(value, 3)] for steps, value in kept]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?")
    parser.add_argument("--bars", action="store_true", help="train nothing: judge the written results by bars.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--random", action="store_true", help="measure random actions first")
    parser.add_argument("--episodes", type=int, default=100, help="greedy episodes of each last checkpoint")
    parser.add_argument("--data", help="the data set to learn from in the place of the recipe's own, by its name")
    parser.add_argument("--folder", type=Path, help="keep the runs here, and go on with those that are there")
    args = parser.parse_args()
    if args.bars:
        write_bars()
        return
    if args.recipe not in BARS:
        parser.error(f"expected a recipe with a bar in benchmarks/bars.yaml, got {args.recipe}")
    recipe = yaml.safe_load((ROOT / "recipes" / f"{args.recipe}.yaml").read_text())
    data = recipe["data"]["init_args"]
    env, clock, random = env_config(data), clock_of(data), None
    if args.data and clock != "updates":
        parser.error(f"--data {args.data}: {args.recipe} does not learn from recorded data")
    name = args.recipe + (f"_from_{args.data}" if args.data else "")
    if args.random:
        random = play_randomly(env)
        print(f"random actions: {random['return_mean']} +- {random['return_std']}", flush=True)
    runs = []
    with contextlib.nullcontext(args.folder) if args.folder else tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            runs.append(run_seed(args.recipe, seed, Path(folder) / name, args.episodes, args.data))
            last = runs[-1]
            steps = f"{last[clock]} {clock.removeprefix('env_')}"
            print(f"seed {seed}: {last['return_mean']} after {steps}, {last['wall_s']} s", flush=True)
    judged = f"greedy, {args.episodes} episodes, last checkpoint"
    if args.recipe in GAMES:
        counts, matches = GAMES[args.recipe]
        agents = " and of ".join(match.agent for match in matches)
        judged = f"% {counts} of {args.episodes} games of {agents} against random actions, greedy, last checkpoint"
    result = {
        "recipe": args.recipe,
        "env": (data["evaluation"] if clock == "updates" else data)["env"],
        "command": f".venv/bin/python benchmarks/results.py {args.recipe} --seeds {' '.join(map(str, args.seeds))}"
        + (" --random" if args.random else "")
        + (f" --data {args.data}" if args.data else "")
        + (f" --episodes {args.episodes}" if args.episodes != 100 else ""),
        "commit": ", ".join(sorted({run.pop("commit") for run in runs})),
        "judged": judged,
        "median": statistics.median(run["return_mean"] for run in runs),
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "versions": {n: importlib.metadata.version(n) for n in ("torch", "lightning", "gymnasium", "numpy")},
        "runs": runs,
    }
    OUT.mkdir(parents=True, exist_ok=True)
    if random is not None:
        result["random"] = random
    if args.data:
        (OUT / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        print(f"{name}: median {result['median']} over seeds {args.seeds}: {OUT / name}.json")
        return
    write(result, OUT / f"{args.recipe}.json")
    gallery.draw(with_bar(result), OUT / f"{args.recipe}.png")
    below = "" if (bar := BARS[args.recipe]) is None else f", {with_bar(result)['below_bar']} below the bar of {bar}"
    print(f"{args.recipe}: median {result['median']} over seeds {args.seeds}{below}: {OUT / args.recipe}.json, .png")


if __name__ == "__main__":
    main()
