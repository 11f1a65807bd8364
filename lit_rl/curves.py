"""Learning curves of runs, from what `CSVLogger` wrote."""

import csv
import difflib
import importlib.util
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lit_rl.checks import check_choice, check_count
from lit_rl.errors import OptionError

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.csv"
COUNTER = re.compile(r"(version|seed)[_=]?\d+")  # folders that tell repetitions of one run apart
# Options that tell repetitions apart, or say where a run is, where it writes and what it shows.
SAME_RUN = (
    "seed_everything",
    "data.init_args.seed",
    "cluster.cpus_per_learner",
    "cluster.gpus_per_learner",
    "cluster.max_failures",
    "cluster.storage_path",
    "cluster.ray_address",
    "trainer.logger",
    "trainer.default_root_dir",
    "trainer.enable_progress_bar",
)
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")  # Okabe and Ito's
MAX_NAMED = 3  # options in a legend's entry
MANY_POINTS = 25  # above, points are not marked


@dataclass(frozen=True, eq=False)
class Run:
    """A run's log.

    Attributes:
        folder: where its metrics.csv is.
        name: of its folder, without `version_0` and the like.
        options: its config, flat: `{"model.init_args.lr": "0.001"}`; empty where none was saved.
        columns: what was logged; NaN where a row has no such value.
    """

    folder: Path
    name: str
    options: dict[str, str]
    columns: dict[str, np.ndarray]

    def points(self, x: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """The rows that have both, in the order of x.

        Raises:
            OptionError: if the run did not log one of them.
        """
        for option, name in (("x", x), ("metric", metric)):
            if name not in self.columns:
                close = difflib.get_close_matches(name, self.columns, n=4, cutoff=0.3) or sorted(self.columns)[:8]
                raise OptionError(
                    f"{option}={name!r}: {self.folder} has no such column. Did you mean {', '.join(close)}?"
                )
        xs, ys = self.columns[x], self.columns[metric]
        both = np.isfinite(xs) & np.isfinite(ys)
        order = np.argsort(xs[both], kind="stable")
        return xs[both][order], ys[both][order]


@dataclass(frozen=True)
class Curve:
    """Runs that differ in their seed alone, on one x axis; `low` and `high` bound what any of them reached."""

    label: str
    x: np.ndarray
    median: np.ndarray
    low: np.ndarray
    high: np.ndarray
    num_runs: int


def find_runs(paths: Sequence[str | Path]) -> list[Run]:
    """The runs in and below folders, each once.

    Raises:
        OptionError: for a path without any.
    """
    folders: dict[Path, None] = {}
    for path in map(Path, paths):
        files = [path] if path.name == METRICS_FILE else sorted(path.rglob(METRICS_FILE), key=_natural)
        found = [file.parent for file in files if file.is_file()]
        if not found:
            raise OptionError(
                f"run={str(path)!r}: expected a folder with a {METRICS_FILE} in it or below, which "
                "Lightning's CSVLogger writes (the recipes use it)."
            )
        folders |= dict.fromkeys(found)
    return [_read(folder) for folder in folders]


def curves_of(runs: Sequence[Run], metric: str, x: str = "env_steps", smooth: int = 1) -> list[Curve]:
    """One curve for all runs of the same name and options, whatever their seed.

    Runs without a value of both are left out, with a warning, as evaluations by themselves are.

    Args:
        runs: what `find_runs` returned.
        metric, x: names of logged columns.
        smooth: each point is the mean of so many: itself and those before it.

    Raises:
        OptionError: if no run has them.
    """
    having = [run for run in runs if {x, metric} <= run.columns.keys() and len(run.points(x, metric)[0])]
    if not having:
        runs[0].points(x, metric)
        raise OptionError(f"metric={metric!r}: {runs[0].folder} has no value of it.")
    left_out = [str(run.folder) for run in runs if run not in having]
    if left_out:
        log.warning("Left out, without a value of %s: %s", metric, ", ".join(left_out))
    runs = having
    groups: dict[tuple[str, frozenset], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.name, frozenset(run.options.items())), []).append(run)
    labels = _labels([members[0] for members in groups.values()])
    return [_curve(label, members, metric, x, smooth) for label, members in zip(labels, groups.values())]


def draw(
    paths: Sequence[str | Path],
    metrics: Sequence[str] = ("rollout/return_mean",),
    x: str = "env_steps",
    output: str | Path = "curves.png",
    smooth: int = 1,
) -> list[Curve]:
    """Draw the curves of runs, a panel for each metric, into a .png, .svg or .pdf file; returns those of the first.

    Raises:
        OptionError: if matplotlib is missing, there is no such run or metric, or the file cannot be drawn.
    """
    check_choice("output", Path(output).suffix, (".png", ".svg", ".pdf"))
    check_count("smooth", smooth)
    if importlib.util.find_spec("matplotlib") is None:
        raise OptionError("Drawing curves needs matplotlib: pip install 'lit-rl[plot]'.")
    runs = find_runs(paths)
    panels = [curves_of(runs, metric, x, smooth) for metric in metrics]
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 1.2 + 3.0 * len(metrics)), layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever display there is
    alike = len({metric.rpartition("/")[2] for metric in metrics}) == 1  # training and evaluation returns, say
    all_axes = figure.subplots(len(metrics), sharex=True, sharey=alike, squeeze=False)[:, 0]
    labels = list(dict.fromkeys(curve.label for curves in panels for curve in curves))
    for axes, metric, curves in zip(all_axes, metrics, panels):
        _draw_panel(axes, curves, labels)
        axes.set_ylabel(metric if smooth == 1 else f"{metric}\n(mean of {smooth} points)")
    all_axes[-1].set_xlabel(x.replace("_", " "))
    if x in ("env_steps", "step"):
        from matplotlib.ticker import EngFormatter

        all_axes[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
    several = any(curve.num_runs > 1 for curve in panels[0])
    title = "line: median of the runs, band: lowest to highest" if several else None
    if len(panels[0]) > 1:
        handles, entries = all_axes[0].get_legend_handles_labels()
        columns = 1 if max(map(len, entries)) > 40 else 2
        figure.legend(
            handles,
            entries,
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            fontsize=9,
            title=title,
            title_fontsize=9,
        )
    else:
        all_axes[0].set_title("\n".join(filter(None, (_with_count(panels[0][0]), title))), fontsize=10)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=130)
    return panels[0]


def _draw_panel(axes: Any, curves: Sequence[Curve], labels: Sequence[str]) -> None:
    for curve in curves:
        i = labels.index(curve.label)  # one colour in all panels
        color, line = COLORS[i % len(COLORS)], ("-", "--", ":", "-.")[i // len(COLORS) % 4]
        marker = "o" if len(curve.x) <= MANY_POINTS else None
        if curve.num_runs > 1:
            axes.fill_between(curve.x, curve.low, curve.high, color=color, alpha=0.18, linewidth=0)
        axes.plot(
            curve.x,
            curve.median,
            line,
            color=color,
            marker=marker,
            markersize=3,
            linewidth=1.6,
            label=_with_count(curve),
        )
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)


def _with_count(curve: Curve) -> str:
    return f"{curve.label} ({curve.num_runs} runs)" if curve.num_runs > 1 else curve.label


def _curve(label: str, runs: Sequence[Run], metric: str, x: str, smooth: int) -> Curve:
    points = [run.points(x, metric) for run in runs]
    smoothed = [(xs, _running_mean(ys, smooth)) for xs, ys in points]
    grid = np.unique(np.concatenate([xs for xs, _ in smoothed]))
    # A run counts where it has been: the rest of one that ended early is not made up.
    rows = np.stack([np.interp(grid, xs, ys, left=np.nan, right=np.nan) for xs, ys in smoothed])
    return Curve(label, grid, np.nanmedian(rows, 0), np.nanmin(rows, 0), np.nanmax(rows, 0), num_runs=len(smoothed))


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of each value and the `window - 1` before it; of fewer at the beginning.

    >>> _running_mean(np.array([1.0, 3.0, 5.0]), 2)
    array([1., 2., 4.])
    """
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    begins = np.maximum(ends - window, 0)
    return (sums[ends] - sums[begins]) / (ends - begins)


def _labels(runs: Sequence[Run]) -> list[str]:
    """What tells runs apart: their names; where these are the same, the options that differ."""
    labels = []
    for run in runs:
        namesakes = [other.options for other in runs if other.name == run.name]
        keys = sorted({key for options in namesakes for key in options})
        different = [key for key in keys if len({options.get(key) for options in namesakes}) > 1]
        named = [f"{key.rpartition('.')[2]}={run.options.get(key, 'default')}" for key in different[:MAX_NAMED]]
        if len(different) > MAX_NAMED:
            named.append("...")
        labels.append(", ".join([run.name, *named]))
    for i, label in enumerate(labels):
        if labels.count(label) > 1:
            labels[i] = f"{label} ({runs[i].folder})"
    return labels


def _read(folder: Path) -> Run:
    with (folder / METRICS_FILE).open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = list(rows[0]) if rows else []
    columns = {name: np.array([_number(row[name]) for row in rows]) for name in names}
    path = folder.resolve()
    while COUNTER.fullmatch(path.name):
        path = path.parent
    options = {
        key: value
        for key, value in _flat(_config(folder)).items()
        if not key.startswith(SAME_RUN) and value != str(None)
    }
    return Run(folder, path.name, options, columns)


def _config(folder: Path) -> Any:
    """The options that `lit-rl` saved beside the log; of a run from Python, the hyper-parameters that Lightning did."""
    for name in ("config.yaml", "hparams.yaml"):
        if (folder / name).is_file():
            try:
                return yaml.safe_load((folder / name).read_text())
            except yaml.YAMLError:  # hyper-parameters that are objects
                return {}
    return {}


def _flat(config: Any, prefix: str = "") -> dict[str, str]:
    if not isinstance(config, dict):
        return {prefix: str(config)}
    flat: dict[str, str] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return float("nan")


def _natural(path: Path) -> list[Any]:
    """Sorts version_10 after version_9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(path))]
