"""How old rows IMPALA can learn from with V-trace and without it: CartPole-v1 under `fixed_lag=k`.

    .venv/bin/python benchmarks/lag.py --write

A cell is a lag, V-trace on or off, and a seed: 300,000 env steps with the settings of recipes/impala_cartpole.yaml but
for one env runner, so that a rollout is 400 env steps, and `LR`, since there are fewer updates. Then the last policy
plays 100 greedy episodes, with seeds that no run has seen. A lag of 64 rollouts is 25,600 env steps. Without V-trace
the loss takes each row as if the present policy had acted, as A2C does. A cell's figures are kept in `--folder`, and a
cell that is there is not run again. About 10 minutes for all 24 cells on two idle cores. `--write` makes
docs/results/lag_cartpole.json and .png.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import yaml
from measuring import quiet_trainer, write
from results import OUT, ROOT

from lit_rl import IMPALA, RolloutDataModule
from lit_rl.evaluation.episodes import play
from lit_rl.viewing.curves import COLORS

BUDGET, LR = 300_000, 2e-3  # env steps; falls to 0 over them
LAGS, SEEDS = (0, 4, 16, 64), (1, 2, 3)
HOLDS, FALLS = 450.0, 300.0  # what a lag must leave of the return with V-trace, and must not leave without


class Uncorrected(IMPALA):
    """IMPALA that learns from any rows without V-trace, which it else refuses where they are old."""

    CORRECTS = True


def run(lag: int, vtrace: bool, seed: int, budget: int = BUDGET, episodes: int = 100) -> dict[str, Any]:
    """One cell."""
    recipe = yaml.safe_load((ROOT / "recipes" / "impala_cartpole.yaml").read_text())
    model, options = recipe["model"]["init_args"] | {"lr": LR}, recipe["data"]["init_args"]
    L.seed_everything(seed, verbose=False)
    algorithm = IMPALA(**model) if vtrace else Uncorrected(vtrace=False, **model)
    data = RolloutDataModule(
        options["env"], num_env_runners=1, num_envs_per_env_runner=options["num_envs_per_env_runner"],
        rollout_length=options["rollout_length"], fixed_lag=lag, max_env_steps=budget, torch_threads=1, seed=seed,
    )  # fmt: skip
    started = time.perf_counter()
    trainer = quiet_trainer()
    trainer.fit(algorithm, data)
    wall_s = time.perf_counter() - started
    seeds = np.random.SeedSequence([seed, 20_000]).generate_state(episodes).tolist()
    returns = [episode.return_ for episode in play(data.env, algorithm.policy, seeds)]
    return {
        "lag": lag,
        "vtrace": vtrace,
        "seed": seed,
        "return_mean": round(statistics.mean(returns), 2),
        "training_return_mean": round(float(trainer.callback_metrics["rollout/return_mean"]), 2),
        "rho_mean": round(float(trainer.callback_metrics["vtrace/rho_mean"]), 3),
        "env_steps": algorithm.env_steps_done,
        "wall_s": round(wall_s, 1),
    }


def medians(cells: list[dict[str, Any]], vtrace: bool) -> dict[int, float]:
    """Of the seeds' returns, for each lag."""
    found: dict[int, list[float]] = {}
    for cell in cells:
        if cell["vtrace"] is vtrace:
            found.setdefault(cell["lag"], []).append(cell["return_mean"])
    return {lag: statistics.median(returns) for lag, returns in sorted(found.items())}


def verdict(cells: list[dict[str, Any]]) -> str:
    """Whether there is a lag at which V-trace alone learns."""
    on, off = medians(cells, True), medians(cells, False)
    lags = [lag for lag in on if on[lag] >= HOLDS and off.get(lag, HOLDS) < FALLS]
    if not lags:
        return f"No lag leaves {HOLDS:g} and more with V-trace and less than {FALLS:g} without it."
    return "; ".join(f"a lag of {lag} leaves {on[lag]:.0f} with V-trace, {off[lag]:.0f} without it" for lag in lags)


def table(cells: list[dict[str, Any]]) -> str:
    on, off = medians(cells, True), medians(cells, False)
    lines = ["| lag in rollouts | with V-trace | without |", "|---|---|---|"]
    for lag in on | off:
        numbers = [f"{found[lag]:.1f}" if lag in found else "" for found in (on, off)]
        lines.append(f"| {lag} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def draw(cells: list[dict[str, Any]], path: Path) -> None:
    """Greedy return over the lag: a line through the medians of the seeds, and a point for each seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    lags = sorted({cell["lag"] for cell in cells})
    place = {lag: i for i, lag in enumerate(lags)}
    for vtrace, label, color, aside in ((True, "with V-trace", COLORS[0], -0.03), (False, "without", COLORS[1], 0.03)):
        points = [(place[cell["lag"]] + aside, cell["return_mean"]) for cell in cells if cell["vtrace"] is vtrace]
        axes.scatter(*zip(*points), color=color, s=16, alpha=0.6, linewidths=0)
        found = medians(cells, vtrace)
        axes.plot([place[lag] + aside for lag in found], list(found.values()), color=color, label=label, linewidth=1.6)
    axes.set(xlabel="lag in rollouts of 400 env steps", ylabel="greedy return, 100 episodes", ylim=(0, 515))
    axes.set_title("IMPALA on CartPole-v1: the median of three seeds, and each seed", fontsize=10)
    axes.set_xticks(range(len(lags)), [str(lag) for lag in lags])
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="lower left")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lags", nargs="+", type=int, default=list(LAGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--folder", type=Path, default=Path("runs/lag"), help="where the cells are kept")
    parser.add_argument("--write", action="store_true", help="write docs/results/lag_cartpole.json and .png")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.folder.mkdir(parents=True, exist_ok=True)
    cells = []
    for seed in args.seeds:
        for lag in args.lags:
            for vtrace in (True, False):
                path = args.folder / f"lag_{lag}_{'on' if vtrace else 'off'}_seed_{seed}.json"
                if not path.exists():
                    path.write_text(json.dumps(run(lag, vtrace, seed)))
                cells.append(json.loads(path.read_text()))
                print(cells[-1], flush=True)
    print(f"\n{table(cells)}\n{verdict(cells)}")
    if args.write:
        figures = {
            "judged": "greedy, 100 episodes, last policy",
            "env_steps": BUDGET,
            "lr": LR,
            "verdict": verdict(cells),
        }
        write("lag_cartpole.json", figures | {"cells": cells})
        draw(cells, OUT / "lag_cartpole.png")


if __name__ == "__main__":
    main()
