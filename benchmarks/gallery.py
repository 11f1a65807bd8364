"""Pictures of the recipes' results, and the part of docs/results/README.md that shows them all.

    .venv/bin/python benchmarks/gallery.py

Draws every docs/results/<recipe>.json that the page's table names, in the style of `lit-rl plot`. Nothing is trained.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from lit_rl.viewing.curves import COLORS, curve_of, draw_panel
from lit_rl.viewing.figures import save_figure

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "results"
PAGE, MARK = OUT / "README.md", "<!-- curves: benchmarks/gallery.py writes what follows -->\n"
OVERVIEW = ("ppo_cartpole", "ppo_lunarlander", "sac_halfcheetah", "ppo_stateless_cartpole_lstm", "tqc_pendulum",
            "mappo_simple_spread")  # fmt: skip
ROW = re.compile(r"^\| (?P<task>.*?) \| \[(?P<algorithm>.*?)\]\((?P<page>.*?)\) \|.*\| `(?P<recipe>\w+)` \|$", re.M)


class Task(NamedTuple):
    """What the page's table says of a recipe."""

    task: str
    algorithm: str
    page: str
    recipe: str


def tasks() -> list[Task]:
    """The rows of the page's table, in order."""
    return [Task(**found.groupdict()) for found in ROW.finditer(PAGE.read_text().partition(MARK)[0])]


def is_of_games(result: dict[str, Any]) -> bool:
    """Whether seeds are judged by a percentage of games, which is no return."""
    return result["judged"].startswith("%")


def draw(result: dict[str, Any], path: Path) -> None:
    """One result: the median of the seeds' returns while they trained, with a band, and what they are judged by."""
    figure = new_figure(6.2, 3.7)
    axes = figure.subplots()
    shown = draw_on(axes, result)
    axes.set_title(result["recipe"], fontsize=11)
    figure.legend(list(shown.values()), list(shown), loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    save_figure(figure, path)


def draw_overview(results: Sequence[tuple[Task, dict[str, Any]]], path: Path) -> None:
    """Six results beside one another, for README."""
    figure = new_figure(11.0, 5.6)
    for axes, (_, result) in zip(figure.subplots(2, 3).flat, results):
        draw_on(axes, result)
        axes.set_title(result["recipe"], fontsize=10)
        axes.set(xlabel="", ylabel="")
    line, marks = figure.axes[0].get_lines(), figure.axes[0].containers
    named = {
        "return while training: median and range of seeds": line[0],
        "greedy return of the last checkpoint: median and range": marks[0],
        "bar": next(x for x in line if x.get_linestyle() == "--"),
    }
    figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    save_figure(figure, path)


def new_figure(width: float, height: float) -> Figure:
    """A figure of some inches that needs no window."""
    matplotlib.use("Agg")
    return Figure(figsize=(width, height), layout="constrained")


def draw_on(axes: Any, result: dict[str, Any]) -> dict[str, Any]:
    """Draw a result; what is shown, by its name."""
    runs = result["runs"]
    clock, name = ("updates" if "updates" in runs[0] else "env_steps"), next(iter(runs[0]["curve"]))
    points = [tuple(np.array(run["curve"][name]).T) for run in runs]
    what = "greedy" if name.startswith("eval/") else "training"
    seeds = f"median and range of {len(runs)} seeds" if len(runs) > 1 else "one seed"
    label = f"{what} return, {seeds}"
    shown = draw_panel(axes, [curve_of(label, points)], [label])
    if not is_of_games(result):
        returns = np.array([run["return_mean"] for run in runs])
        ends = [[result["median"] - returns.min()], [returns.max() - result["median"]]]
        at = max(run[clock] for run in runs)
        shown["last checkpoint, greedy: median and range"] = axes.errorbar(
            at, result["median"], ends, fmt="D", color=COLORS[1], markersize=5, capsize=4
        )
        if result["bar"] is not None:
            shown[f"bar: {result['bar']:g}"] = axes.axhline(result["bar"], color=COLORS[6], linewidth=1, linestyle="--")
        if "random" in result:
            random = result["random"]["return_mean"]
            shown[f"random actions: {random:.1f}"] = axes.axhline(random, color="grey", linewidth=1, linestyle=":")
    axes.set(xlabel=clock.replace("_", " "), ylabel="return")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.margins(x=0.02)
    return shown


def text(results: Sequence[tuple[Task, dict[str, Any]]]) -> str:
    """What follows the mark in docs/results/README.md."""
    lines: list[str] = []
    for task, result in results:
        runs = result["runs"]
        returns = ", ".join(f"{run['return_mean']:g}" for run in runs)
        length = runs[0].get("updates") or runs[0]["env_steps"]
        after = f"{length:,} {'updates' if 'updates' in runs[0] else 'env steps'}"
        seeds = f"seeds {runs[0]['seed']} to {runs[-1]['seed']}" if len(runs) > 1 else f"seed {runs[0]['seed']}"
        unit = " % of games" if is_of_games(result) else ""
        bar = "" if result["bar"] is None else f"; the bar is {result['bar']:g}"
        said = f"**{task.task}, [{task.algorithm}]({task.page})**: {result['median']:g}{unit} after {after}"
        lines += [
            "",
            f"{said} ({seeds}: {returns}{bar}). [Recipe](../../recipes/{task.recipe}.yaml), "
            f"[figures]({task.recipe}.json).",
            "",
            f"![{task.recipe}: learning curve]({task.recipe}.png)",
        ]
    return "\n".join(lines) + "\n"


def measured() -> list[tuple[Task, dict[str, Any]]]:
    """The recipes in the table that have a result, in order."""
    bars = yaml.safe_load((ROOT / "benchmarks" / "bars.yaml").read_text())
    found = []
    for task in tasks():
        path = OUT / f"{task.recipe}.json"
        if task.recipe in bars and path.exists():
            found.append((task, json.loads(path.read_text())))
    return found


def main() -> None:
    results = measured()
    for task, result in results:
        draw(result, OUT / f"{task.recipe}.png")
    by_recipe = {task.recipe: (task, result) for task, result in results}
    draw_overview([by_recipe[name] for name in OVERVIEW], ROOT / "docs" / "curves.png")
    PAGE.write_text(PAGE.read_text().partition(MARK)[0] + MARK + text(results))
    print(f"{len(results)} pictures, {PAGE}")


if __name__ == "__main__":
    main()
