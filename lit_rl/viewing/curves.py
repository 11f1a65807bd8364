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

from lit_rl.errors import OptionError
from lit_rl.options import Count, check, check_ending
from lit_rl.viewing.figures import save_figure

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
        options: its config, flat: `{"model.init_args.lr": "0.001"}`; of a run from Python, what Lightning saved.
        complete: whether these are all its options, so that another run may be found to be the same.
        columns: what was logged; NaN where a row has no such value.
    """

    folder: Path
    name: str
    options: dict[str, str]
    complete: bool
    columns: dict[str, np.ndarray]

    def has(self, x: str, metric: str) -> bool:
        """Whether there is a row with both."""
        return {x, metric} <= self.columns.keys() and len(self.points(x, metric)[0]) > 0

    def points(self, x: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """The rows that have both, in the order of x.

        Raises:
            OptionError: if the run did not log one of them.
        """
        for option, name in (("x", x), ("metric", metric)):
            if name not in self.columns:
                if not self.columns:
                    raise OptionError(f"{option}={name!r}: {self.folder / METRICS_FILE} is empty.")
                close = difflib.get_close_matches(name, self.columns, n=4)
                others = f"Did you mean {', '.join(close)}?" if close else f"It has {', '.join(sorted(self.columns))}."
                raise OptionError(f"{option}={name!r}: {self.folder} has no such column. {others}")
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


def curves_of(runs: Sequence[Run], metrics: Sequence[str], x: str = "env_steps", smooth: int = 1) -> list[list[Curve]]:
    """For each metric one curve for all runs of the same name and options, whatever their seed; labelled alike in all.

    A run without a `config.yaml`, as one from Python is, is a curve by itself: what its environment was is not known.
    Runs without a value of both are left out, with a warning, as evaluations by themselves are.

    Args:
        runs: as `find_runs` gives them.
        metrics, x: names of columns.
        smooth: points of the running mean of each run.

    Raises:
        OptionError: if no run has them.
    """
    shown: list[Run] = []
    for metric in metrics:
        having = [run for run in runs if run.has(x, metric)]
        if not having:
            runs[0].points(x, metric)
            raise OptionError(f"metric={metric!r}: {runs[0].folder} has no value of it.")
        left_out = [str(run.folder) for run in runs if run not in having]
        if left_out:
            log.warning("Left out, without a value of %s: %s", metric, ", ".join(left_out))
        shown += having
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        if run in shown:
            same = (run.name, frozenset(run.options.items())) if run.complete else run
            groups.setdefault(same, []).append(run)
    labels = _labels([members[0] for members in groups.values()])
    panels = []
    for metric in metrics:
        found = [[run for run in members if run.has(x, metric)] for members in groups.values()]
        panels.append(
            [
                curve_of(label, [run.points(x, metric) for run in some], smooth)
                for label, some in zip(labels, found)
                if some
            ]
        )
    return panels


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
    check_ending("output", output, (".png", ".svg", ".pdf"))
    check("smooth", smooth, Count)
    if importlib.util.find_spec("matplotlib") is None:
        raise OptionError("Drawing curves needs matplotlib: pip install 'lit-rl[plot]'.")
    runs = find_runs(paths)
    panels = curves_of(runs, metrics, x, smooth)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 1.2 + 3.0 * len(metrics)), layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever display there is
    alike = len({metric.rpartition("/")[2] for metric in metrics}) == 1  # training and evaluation returns, say
    all_axes = figure.subplots(len(metrics), sharex=True, sharey=alike, squeeze=False)[:, 0]
    curves = [curve for panel in panels for curve in panel]
    labels = list(dict.fromkeys(curve.label for curve in curves))
    lines: dict[str, Any] = {}
    for axes, metric, panel in zip(all_axes, metrics, panels):
        lines |= draw_panel(axes, panel, labels)
        axes.set_ylabel(metric if smooth == 1 else f"{metric}\n(mean of {smooth} points)")
    all_axes[-1].set_xlabel(x.replace("_", " "))
    if x in ("env_steps", "step"):
        from matplotlib.ticker import EngFormatter

        all_axes[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
    num_runs = {label: max(curve.num_runs for curve in curves if curve.label == label) for label in labels}
    title = "line: median of the runs, band: lowest to highest" if max(num_runs.values()) > 1 else None
    entries = [f"{label} ({n} runs)" if n > 1 else label for label, n in num_runs.items()]
    if len(labels) > 1:
        columns = 1 if max(map(len, entries)) > 40 else 2
        figure.legend(
            [lines[label] for label in labels],
            entries,
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            fontsize=9,
            title=title,
            title_fontsize=9,
        )
    else:
        all_axes[0].set_title("\n".join(filter(None, (entries[0], title))), fontsize=10)
    save_figure(figure, output)
    return panels[0]


def draw_panel(axes: Any, curves: Sequence[Curve], labels: Sequence[str]) -> dict[str, Any]:
    """Draws curves, each in the colour of its place among the labels; returns their lines by label."""
    lines = {}
    for curve in curves:
        i = labels.index(curve.label)
        color, style = COLORS[i % len(COLORS)], ("-", "--", ":", "-.")[i // len(COLORS) % 4]
        marker = "o" if len(curve.x) <= MANY_POINTS else None
        if curve.num_runs > 1 and len(curve.x) == 1:  # a band has no width there
            ends = [curve.median - curve.low, curve.high - curve.median]
            axes.errorbar(curve.x, curve.median, ends, color=color, alpha=0.5, capsize=3)
        elif curve.num_runs > 1:
            axes.fill_between(curve.x, curve.low, curve.high, color=color, alpha=0.18, linewidth=0)
        (lines[curve.label],) = axes.plot(
            curve.x, curve.median, style, color=color, marker=marker, markersize=3, linewidth=1.6
        )
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)
    return lines


def curve_of(label: str, points: Sequence[tuple[np.ndarray, np.ndarray]], smooth: int = 1) -> Curve:
    """One curve for runs of which each gives points x and y, with a running mean of `smooth` of them."""
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
    """What tells runs apart: their names; where these are the same, the options that differ.

    Where many differ, as among runs with one part off each, those in which a run is not as most are.
    """
    labels = []
    for run in runs:
        namesakes = [other.options for other in runs if other.name == run.name]
        keys = sorted({key for options in namesakes for key in options})
        different = [key for key in keys if len({options.get(key) for options in namesakes}) > 1]
        if len(different) > MAX_NAMED:
            values = {key: [options.get(key) for options in namesakes] for key in different}
            different = [key for key in different if 2 * values[key].count(run.options.get(key)) <= len(namesakes)]
        named = [f"{key.rpartition('.')[2]}={run.options.get(key, 'default')}" for key in different[:MAX_NAMED]]
        if len(different) > MAX_NAMED:
            named.append("...")
        labels.append(", ".join([run.name, *named]))
    return [f"{label} ({run.folder})" if labels.count(label) > 1 else label for label, run in zip(labels, runs)]


def _read(folder: Path) -> Run:
    path = folder.resolve()
    while COUNTER.fullmatch(path.name):
        path = path.parent
    config, complete = _config(folder)
    options = {
        key: value for key, value in _flat(config).items() if not key.startswith(SAME_RUN) and value != str(None)
    }
    return Run(folder, path.name, options, complete, _columns(folder / METRICS_FILE))


def _columns(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            names, *rows = list(csv.reader(file)) or [[]]
    except UnicodeDecodeError as error:
        raise OptionError(f"run={str(path)!r} is not UTF-8: {error}.") from error
    except (OSError, csv.Error) as error:
        raise OptionError(f"run={str(path)!r} cannot be read: {error}.") from error
    for i, row in enumerate(rows):
        if len(row) > len(names):
            raise OptionError(
                f"run={str(path)!r}: row {i + 2} has {len(row)} cells, expected at most {len(names)}, as many as there "
                "are names in the first. Mend it, or leave the run out."
            )
    # The last row of a run that goes on may be short.
    return {
        name: np.array([_number(row[i]) if i < len(row) else np.nan for row in rows]) for i, name in enumerate(names)
    }


def _config(folder: Path) -> tuple[Any, bool]:
    """What is known of a run's options, and whether that is all: `lit-rl` saves all, Lightning those of the model."""
    for name, complete in (("config.yaml", True), ("hparams.yaml", False)):
        if (folder / name).is_file():
            try:
                return yaml.safe_load((folder / name).read_text(encoding="utf-8")), complete
            except (yaml.YAMLError, UnicodeDecodeError):  # hyper-parameters that are objects
                return {}, False
    return {}, False


def _flat(config: Any, prefix: str = "") -> dict[str, str]:
    if not isinstance(config, dict):
        return {prefix: str(config)}
    flat: dict[str, str] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _number(text: str) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return float("nan")


def _natural(path: Path) -> list[Any]:
    """Sorts version_10 after version_9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(path))]
