"""Curves of runs: which runs are one curve, what its numbers are, and the picture."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from lit_rl import cli
from lit_rl.errors import OptionError
from lit_rl.viewing.curves import curves_of, draw, find_runs


def write_run(folder: str, returns: list[float], seed: int = 1, lr: float = 0.1, step: int = 10) -> Path:
    """A run that logged a return every `step` env steps, one without in between."""
    path = Path(folder)
    path.mkdir(parents=True)
    rows = [f"{(i + 1) * step},{value}," for i, value in enumerate(returns)]
    rows.insert(1, f"{step},,7.0")
    (path / "metrics.csv").write_text("\n".join(["env_steps,rollout/return_mean,eval/return_mean", *rows]) + "\n")
    config = {"seed_everything": seed, "model": {"class_path": "PPO", "init_args": {"lr": lr}}}
    config["trainer"] = {"logger": {"init_args": {"version": path.name}}}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    return path


def test_runs_that_differ_in_their_seed_are_one_curve_with_a_band() -> None:
    for seed, returns in enumerate(([0, 1, 2], [0, 3, 9], [0, 2, 4])):
        write_run(f"runs/cart/version_{seed}", returns, seed=seed)
    (curve,) = curves_of(find_runs(["runs"]), ["rollout/return_mean"])[0]
    assert (curve.label, curve.num_runs) == ("cart", 3)
    assert curve.x.tolist() == [10, 20, 30]
    assert (curve.low.tolist(), curve.median.tolist(), curve.high.tolist()) == ([0, 1, 2], [0, 2, 4], [0, 3, 9])


def test_other_options_are_another_curve_and_named() -> None:
    write_run("runs/cart/version_0", [0, 1])
    write_run("runs/cart/version_1", [0, 2], lr=0.2)
    write_run("runs/pole/seed_1/version_0", [0, 3])
    curves = curves_of(find_runs(["runs"]), ["rollout/return_mean"])[0]
    assert [curve.label for curve in curves] == ["cart, lr=0.1", "cart, lr=0.2", "pole"]
    assert [curve.num_runs for curve in curves] == [1, 1, 1]


def test_a_run_that_ended_early_counts_as_far_as_it_got() -> None:
    write_run("runs/cart/version_0", [0, 0, 0, 0])
    write_run("runs/cart/version_1", [4, 4])
    (curve,) = curves_of(find_runs(["runs"]), ["rollout/return_mean"])[0]
    assert curve.median.tolist() == [2, 2, 0, 0]


def test_logs_with_different_steps_are_laid_over_each_other() -> None:
    write_run("runs/cart/version_0", [0, 10, 20], step=10)
    write_run("runs/cart/version_1", [10, 30], step=15)
    (curve,) = curves_of(find_runs(["runs"]), ["rollout/return_mean"])[0]
    assert curve.x.tolist() == [10, 15, 20, 30]
    assert curve.high[1:].tolist() == pytest.approx([10, 10 + 20 / 3, 30])


def test_smoothing_is_the_mean_of_a_point_and_those_before_it() -> None:
    write_run("runs/cart/version_0", [1, 3, 5, 7])
    (curve,) = curves_of(find_runs(["runs"]), ["rollout/return_mean"], smooth=2)[0]
    np.testing.assert_allclose(curve.median, [1, 2, 4, 6])


def test_an_evaluation_by_itself_is_no_curve_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    write_run("runs/cart/version_0", [0, 1])
    other = write_run("runs/cart/version_1", [0, 1], lr=0.5)
    (other / "metrics.csv").write_text("step,eval/return_mean\n0,500\n")
    (curve,) = curves_of(find_runs(["runs"]), ["rollout/return_mean"])[0]
    assert (curve.label, curve.num_runs) == ("cart", 1)
    assert str(other) in caplog.text


def test_each_run_is_read_once_and_in_the_order_of_numbers() -> None:
    for i in (10, 9):
        write_run(f"runs/cart/version_{i}", [i])
    found = find_runs(["runs/cart/version_9", "runs", "runs/cart/version_10/metrics.csv"])
    assert [run.folder.name for run in found] == ["version_9", "version_10"]


def test_the_command_draws_a_picture_and_says_where_curves_end(capsys: pytest.CaptureFixture) -> None:
    write_run("runs/cart/version_0", [1, 2])
    write_run("runs/cart/version_1", [1, 4], seed=2)
    cli.main(
        ["plot", "runs/cart", "--metric", "rollout/return_mean", "--metric", "eval/return_mean", "-o", "new/a.png"]
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "cart: rollout/return_mean 3 at env_steps 20 (median of 2 runs)",
        "Curves: new/a.png",
    ]
    from matplotlib.image import imread

    picture = imread("new/a.png")
    assert picture.shape[0] > 800 and picture.shape[1] > 900
    colors = np.unique((picture[..., :3] * 255).round().astype(int).reshape(-1, 3), axis=0).tolist()
    assert [0x00, 0x72, 0xB2] in colors  # the line


def test_of_many_options_that_differ_a_label_has_those_in_which_the_run_is_not_as_most_are() -> None:
    parts = ("double", "dueling", "noisy", "prioritized")
    for off in ("none", *parts):
        folder = write_run(f"{off}/run/version_0", [1, 2])
        options = {part: part != off for part in parts}
        (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"init_args": options}}))
    curves = curves_of(find_runs([*parts, "none"]), ["rollout/return_mean"])[0]
    assert [curve.label for curve in curves] == [*(f"run, {part}=False" for part in parts), "run"]


def test_many_curves_have_a_legend_below_and_other_formats_work() -> None:
    for i in range(9):
        write_run(f"runs/cart{i}/version_0", [i, i + 1])
    draw(["runs"], output="a.svg")
    text = Path("a.svg").read_text()
    assert text.startswith("<?xml")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], ["run='nowhere'", "metrics.csv"]),
        (["runs", "--metric", "rollout/return"], ["metric='rollout/return'", "rollout/return_mean"]),
        (["runs", "--x", "envsteps"], ["x='envsteps'", "env_steps"]),
        (["runs", "-o", "a.bmp"], ["output='a.bmp'", ".png"]),
        (["runs", "-o", "folder.png"], ["output='folder.png' cannot be written", "directory"]),
        (["runs", "-o", "afile/x/a.png"], ["output='afile/x/a.png' cannot be written", "afile"]),
        (["runs", "-o", "afile/a.png"], ["output='afile/a.png' cannot be written", "afile"]),
        (["runs", "--metric", "foo"], ["metric='foo'", "It has env_steps, eval/return_mean, rollout/return_mean."]),
        (["latin"], ["run='latin/metrics.csv' is not UTF-8"]),
        (["surplus"], ["run='surplus/metrics.csv': row 2 has 4 cells, expected at most 2"]),
        (["empty"], ["empty/metrics.csv is empty."]),
        (["runs", "--smooth", "0"], ["smooth=0"]),
        ([], ["runs"]),
    ],
)
def test_a_mistake_is_answered_in_one_sentence(capsys: pytest.CaptureFixture, arguments: list, words: list) -> None:
    write_run("runs/cart/version_0", [1, 2])
    Path("folder.png").mkdir()
    Path("afile").touch()
    header = b"env_steps,rollout/return_mean\n"
    for name, content in (("latin", header + b"1,\xff\n"), ("surplus", header + b"1,2,3,4\n2,3\n"), ("empty", b"")):
        Path(name).mkdir()
        Path(name, "metrics.csv").write_bytes(content)
    with pytest.raises(SystemExit) as caught:
        cli.main(["plot", *arguments])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("lit-rl: error: ") and all(word in line for word in words), line
    assert caught.value.code == 2


def test_a_short_row_is_read_as_far_as_it_goes() -> None:
    run = write_run("runs/cart/version_0", [1, 2])
    with (run / "metrics.csv").open("a") as file:
        file.write("30")
    (curve,) = curves_of(find_runs(["runs"]), ["rollout/return_mean"])[0]
    assert curve.x.tolist() == [10, 20]


def test_runs_from_python_are_not_taken_for_repetitions() -> None:
    for i in range(2):
        run = write_run(f"runs/lightning_logs/version_{i}", [i, i])
        (run / "config.yaml").unlink()
        (run / "hparams.yaml").write_text("lr: 0.1\n")
    curves = curves_of(find_runs(["runs"]), ["rollout/return_mean"])[0]
    assert [(curve.label, curve.num_runs) for curve in curves] == [
        ("lightning_logs (runs/lightning_logs/version_0)", 1),
        ("lightning_logs (runs/lightning_logs/version_1)", 1),
    ]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are drawn."""
    from matplotlib.figure import Figure

    drawn, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: drawn.append(self) or savefig(self, *args))
    return drawn


def test_a_run_has_one_colour_in_all_panels_and_the_legend_names_every_curve(figures: list[Any]) -> None:
    logs = {
        "a": "env_steps,policy/kl\n10,1\n20,2\n",
        "b": "env_steps,rollout/return_mean\n10,1\n20,2\n",
        "c": "env_steps,policy/kl,rollout/return_mean\n10,3,1\n20,4,2\n",
    }
    for name, log in logs.items():
        (write_run(f"runs/{name}/version_0", []) / "metrics.csv").write_text(log)
    draw(["runs"], ["rollout/return_mean", "policy/kl"], output="a.png")
    (figure,) = figures
    colors = [[line.get_color() for line in axes.lines] for axes in figure.axes]
    assert colors == [["#0072B2", "#D55E00"], ["#009E73", "#D55E00"]]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["b", "c", "a"]
    assert [handle.get_color() for handle in legend.legend_handles] == ["#0072B2", "#D55E00", "#009E73"]


def test_a_legend_is_there_where_only_another_panel_has_several_curves(figures: list[Any]) -> None:
    write_run("runs/cart/version_0", [1, 2])
    other = write_run("runs/cart/version_1", [1, 2], lr=0.5)
    (other / "metrics.csv").write_text("env_steps,eval/return_mean\n10,5\n")
    draw(["runs"], ["rollout/return_mean", "eval/return_mean"], output="a.png")
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["cart, lr=0.1", "cart, lr=0.5"]


def test_a_single_point_of_several_runs_has_a_bar_of_no_width(figures: list[Any]) -> None:
    write_run("runs/cart/version_0", [1])
    write_run("runs/cart/version_1", [4], seed=2)
    draw(["runs"], output="a.PNG")
    (axes,) = figures[0].axes
    (bar,) = axes.containers
    assert bar.has_yerr and Path("a.PNG").read_bytes().startswith(b"\x89PNG")


def test_the_end_of_a_curve_is_told_where_x_is_no_whole_number(capsys: pytest.CaptureFixture) -> None:
    run = write_run("runs/cart/version_0", [1])
    (run / "metrics.csv").write_text("time/update_s,rollout/return_mean\n0.0125,7\n")
    cli.main(["plot", "runs", "--x", "time/update_s"])
    assert "at time/update_s 0.0125 (1 run)" in capsys.readouterr().out


def test_matplotlib_that_is_missing_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    write_run("runs/cart/version_0", [1, 2])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"pip install 'lit-rl\[plot\]'"):
        draw(["runs"])
