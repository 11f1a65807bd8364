"""What recorded episodes are like: returns, lengths, and which actions and observations they have."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from lit_rl.errors import OptionError
from lit_rl.files.episodes import Rows, spaces_of
from lit_rl.files.finding import File
from lit_rl.options import check_ending
from lit_rl.spec import class_counts
from lit_rl.viewing.figures import save_figure

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
BINS = 20  # into which the bounds of a number are divided, to say how much of them is covered
MOST_SHOWN = 24  # numbers of one column


def outcomes(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """The return of each episode, the sum over its agents, and its steps: those of the agent with the most."""
    columns, begins = rows.columns, rows.begins[:-1]
    if not len(begins):
        return np.zeros(0), np.zeros(0, np.int64)
    reward = np.add.reduceat(np.where(columns["closing"], 0.0, columns["reward"]), begins)
    lengths = np.diff(rows.begins) - np.add.reduceat(columns["closing"].astype(np.int64), begins)
    number = np.searchsorted(rows.first, begins, "right")  # of the file, beside which an episode's number is its own
    _, episode = np.unique(np.stack([number, columns["episode"][begins]]), axis=1, return_inverse=True)
    episode = episode.reshape(-1)
    longest = np.zeros(episode.max() + 1, np.int64)
    np.maximum.at(longest, episode, lengths)
    return np.bincount(episode, reward), longest


def describe(rows: Rows) -> list[str]:
    """Recorded episodes in lines of text."""
    columns, spec = rows.columns, rows.spec
    returns, lengths = outcomes(rows)
    steps = ~columns["closing"]
    ends = rows.begins[1:] - 1 - columns["closing"][rows.begins[1:] - 1]
    lines = [
        f"Episodes: {_count(len(returns))} of {spec.env_id}, {_count(int(steps.sum()))} steps, in {len(rows.files)} "
        f"file{'s' if len(rows.files) > 1 else ''}"
    ]
    if rows.agents is not None:
        counts = {agent: rows.agents.count(agent) for agent in sorted(set(rows.agents))}
        lines.append(f"Agents: {', '.join(f'{agent} in {count} episodes' for agent, count in counts.items())}")
    lines += [_spread("Return", returns), _spread("Length", lengths)]
    terminated, truncated = (int(columns[name][ends].sum()) for name in ("terminated", "truncated"))
    cut = int((~(columns["terminated"] | columns["truncated"])[ends]).sum())
    lines.append(f"Ends: {terminated} terminated, {truncated} truncated{f', {cut} cut off' if cut else ''}")
    without = sum(file.format == 1 for file in rows.files)
    if without:
        dropped = int((~columns["terminated"][ends] & ~columns["closing"][rows.begins[1:] - 1]).sum())
        lines.append(
            f"Without final observations (format 1): {without} of {len(rows.files)} files, so that the last transition "
            f"of {dropped} episodes cannot be learned from"
        )
    if "deterministic" in columns:
        share = columns["deterministic"][steps].mean() if steps.any() else 0.0
        versions = columns["policy_version"][steps]
        lines.append(f"Actions: {share:.0%} greedy, by policies after {versions.min():,} to {versions.max():,} updates")
    for path, space in spaces_of(spec).items():
        lines += _column(path, space, columns[path][steps] if path.startswith("action") else columns[path])
    return lines


def draw_histograms(rows: Rows, output: str | Path) -> None:
    """Draw how often there is which return, and which length, into a .png, .svg or .pdf file.

    Raises:
        OptionError: if matplotlib is missing, or the file cannot be written.
    """
    check_ending("output", output, (".png", ".svg", ".pdf"))
    if importlib.util.find_spec("matplotlib") is None:
        raise OptionError("Drawing histograms needs matplotlib: pip install 'lit-rl[plot]'.")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.4), layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever display there is
    returns, lengths = outcomes(rows)
    for axes, name, values in zip(figure.subplots(1, 2, sharey=True), ("return", "length"), (returns, lengths)):
        spread = len(np.unique(values)) > 1
        axes.hist(values, bins=40 if spread else 1, color="#0072B2", edgecolor="white", linewidth=0.4)
        middle = float(np.median(values))
        axes.axvline(middle, color="#D55E00", linewidth=1.4, label=f"median {middle:,.4g}")
        axes.set_xlabel(f"{name} of an episode")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        axes.legend(frameon=False, fontsize=9)
    figure.axes[0].set_ylabel("episodes")
    figure.suptitle(f"{rows.spec.env_id}: {_count(len(returns))} episodes", fontsize=11)
    save_figure(figure, output)


def _spread(name: str, values: np.ndarray) -> str:
    if not len(values):
        return f"{name}: none"
    quantiles = ", ".join(f"{q:.0%} {x:.6g}" for q, x in zip(QUANTILES, np.quantile(values, QUANTILES)))
    ends = f"min {values.min():.6g}, max {values.max():.6g}"
    return f"{name}: mean {values.mean():.6g}, std {values.std():.4g}, {ends}; {quantiles}"


def _column(path: str, space: gym.Space, values: np.ndarray) -> list[str]:
    """What values [N, ...] of a space a column has."""
    if not len(values):
        return [f"{path}: none"]
    counts, flat = class_counts(space), values.reshape(len(values), -1)
    if counts:
        start = np.broadcast_to(np.asarray(getattr(space, "start", 0)), space.shape or ()).reshape(-1)
        found = [np.bincount(flat[:, i] - start[i], minlength=n) for i, n in enumerate(counts)]
        whole = _named(path, len(found))
        return [_classes(name, count, int(first)) for name, count, first in zip(whole, found, start)]
    low, high, mean, std = flat.min(0), flat.max(0), flat.mean(0, dtype=np.float64), flat.std(0, dtype=np.float64)
    if flat.shape[1] > MOST_SHOWN:
        return [f"{path}: {flat.shape[1]} numbers from {low.min():.4g} to {high.max():.4g}, mean {mean.mean():.4g}"]
    lines = []
    bounds: Any = [None] * flat.shape[1]
    if isinstance(space, spaces.Box):
        bounds = list(zip(space.low.reshape(-1), space.high.reshape(-1)))
    for i, name in enumerate(_named(path, flat.shape[1])):
        covered = "" if bounds[i] is None else _covered(flat[:, i], *bounds[i])
        lines.append(f"{name}: {low[i]:.4g} to {high[i]:.4g}, mean {mean[i]:.4g}, std {std[i]:.4g}{covered}")
    return lines


def _covered(values: np.ndarray, low: float, high: float) -> str:
    """How much of its bounds a number covers, where it has bounds."""
    if not (np.isfinite(low) and np.isfinite(high) and low < high and high - low < 1e30):
        return ""
    filled = np.count_nonzero(np.histogram(values, BINS, (float(low), float(high)))[0])
    return f"; {filled / BINS:.0%} of [{low:.4g}, {high:.4g}] covered"


def _classes(name: str, counts: np.ndarray, start: int) -> str:
    seen = np.flatnonzero(counts)
    shown = ", ".join(f"{start + i}: {counts[i] / counts.sum():.1%}" for i in seen[:MOST_SHOWN])
    more = ", ..." if len(seen) > MOST_SHOWN else ""
    return f"{name}: {len(seen)} of {len(counts)} values covered ({shown}{more})"


def _named(path: str, count: int) -> list[str]:
    return [path] if count == 1 else [f"{path}[{i}]" for i in range(count)]


def _count(number: int) -> str:
    return f"{number:,}"


def faults(found: Mapping[File, Rows]) -> list[str]:
    """What is wrong with files that can be read, taken together: a sentence each."""
    said, owner = [], {}  # type: ignore[var-annotated]
    for path, rows in found.items():
        for number in np.unique(rows.columns["episode"]).tolist():
            other = owner.setdefault((path.parent, number), path)
            if other != path:
                said.append(f"{path} has episode {number}, which {other} has too.")
    ids: dict[str, File] = {}
    for path, rows in found.items():
        for id_ in rows.files[0].ids:
            other = ids.setdefault(id_, path)
            if other != path:
                said.append(f"{path} has an episode that {other} has too, with another number.")
    return said
