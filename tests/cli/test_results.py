"""What pages and recipes say of results is what `docs/results` holds."""

import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from helpers import ROOT

RECIPES = {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
BARS = yaml.safe_load((ROOT / "benchmarks" / "bars.yaml").read_text())
RESULTS = sorted(path for path in (ROOT / "docs" / "results").glob("*.json") if path.stem in RECIPES)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_recipes_first_comment_gives_its_measured_returns(path: Path) -> None:
    result = json.loads(path.read_text())
    returns = ", ".join(f"{run['return_mean']:g}" for run in result["runs"])
    head = (ROOT / "recipes" / f"{path.stem}.yaml").read_text().split("seed_everything")[0]
    seeds = [run["seed"] for run in result["runs"]]
    named = f"seeds {seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"seed {seeds[0]}"
    assert f"{named}: {returns}; median {result['median']:g}." in head
    run = result["runs"][0]
    steps = f"{run['updates']:,} updates" if "updates" in run else f"{run['env_steps']:,} env steps"
    assert steps in head
    assert path.with_suffix(".png").exists()


def test_the_front_page_shows_results_as_the_table_of_all_does() -> None:
    readme, page = ((ROOT / name).read_text() for name in ("README.md", "docs/results/README.md"))
    rows = re.findall(r"^\|.*\| `\w+` \|$", readme, re.M)
    assert len(rows) == 6 and set(rows) <= set(re.sub(r"\]\(\.\./", "](docs/", page).splitlines())


def test_each_recipe_has_a_bar() -> None:
    assert BARS.keys() == RECIPES


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_result_counts_its_seeds_below_the_bar_and_the_tables_show_it(path: Path) -> None:
    result, bar = json.loads(path.read_text()), BARS[path.stem]
    below = None if bar is None else len([run for run in result["runs"] if run["return_mean"] < bar])
    assert (result["bar"], result["below_bar"]) == (bar, below)
    shown = "- | -" if bar is None else f"{bar:g} | {below}"
    median = rf"{result['median']:.1f}".removesuffix(".0")
    table, page = ((ROOT / name).read_text() for name in ("docs/results/README.md", "docs/ppo.md"))
    seeds = rf"[\w.]+ \| {len(result['runs'])}"
    assert re.search(rf"^\|.* {re.escape(f'| {median} | {shown} |')} {seeds} \| `{path.stem}` \|$", table, re.M)
    for row in re.findall(rf"^\| `{path.stem}` \|.*", page, re.M):
        assert f" | {median} | {shown} | " in row


def test_the_gallery_shows_every_result_and_is_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    gallery = importlib.import_module("gallery")
    measured = gallery.measured()
    assert {task.recipe for task, _ in measured} == {path.stem for path in RESULTS}
    assert gallery.PAGE.read_text().partition(gallery.MARK)[2] == gallery.text(measured), "run benchmarks/gallery.py"
    for name in ("ppo_tictactoe", "iql_pendulum"):  # of games; of updates, beside random actions
        gallery.draw(next(result for task, result in measured if task.recipe == name), tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_results_are_judged_by_new_bars_without_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    results = importlib.import_module("results")
    monkeypatch.setattr(results, "BARS", {"easy": 1, "hard": 2.5, "comparison": None, "not_measured": 1})
    runs = [{"return_mean": 1.0}, {"return_mean": 2.0}, {"return_mean": 3.0}]
    for name in ("easy", "hard", "comparison"):
        old = {"recipe": name, "median": 2.0, "bar": 9, "below_bar": 9, "runs": runs}
        (tmp_path / f"{name}.json").write_text(json.dumps(old))
    results.write_bars(tmp_path)
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert {name: (new["bar"], new["below_bar"]) for name, new in found.items()} == {
        "easy": (1, 0), "hard": (2.5, 2), "comparison": (None, None),
    }  # fmt: skip
    assert all(new["median"] == 2.0 and new["runs"] == runs for new in found.values())


def test_a_seed_that_was_stopped_goes_on_from_its_newest_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    results = importlib.import_module("results")
    run, commands = tmp_path / "seed_7", []

    def fit(command: list[str], **_: Any) -> Any:
        """A run that is stopped after three rows of its log, and then one that goes on from the second."""
        version = run / f"version_{len(commands)}"
        (version / "checkpoints").mkdir(parents=True)
        last = version / "checkpoints" / ("last.ckpt" if commands else "interrupted.ckpt")
        last.touch()
        commands.append(command)
        steps = range(1, 4) if len(commands) == 1 else range(3, 6)
        (version / "metrics.csv").write_text("\n".join(["env_steps,x", *(f"{n},{len(commands)}" for n in steps)]))
        return SimpleNamespace(returncode=143 if len(commands) == 1 else 0, stderr="SIGTERM")

    monkeypatch.setattr(results, "commit", lambda: f"commit {len(commands)}")
    monkeypatch.setattr(results.subprocess, "run", fit)
    with pytest.raises(SystemExit, match="seed 7 failed, or was stopped"):
        results.train("ppo_cartpole", 7, tmp_path)
    assert not (run / "trained.json").exists()
    results.train("ppo_cartpole", 7, tmp_path)
    assert "--ckpt_path" not in commands[0]
    assert commands[1][-2:] == ["--ckpt_path", str(run / "version_0" / "checkpoints" / "interrupted.ckpt")]
    trained = json.loads((run / "trained.json").read_text())
    assert trained["commit"] == "commit 1, commit 2" and trained["parts"] == 2
    rows = [(row["env_steps"], row["x"]) for row in results.read_metrics(run, "env_steps")]
    assert rows == [("1", "1"), ("2", "1"), ("3", "2"), ("4", "2"), ("5", "2")]


def test_the_table_of_defaults_in_the_docs_is_the_one_that_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    table = importlib.import_module("defaults").table()
    page = (ROOT / "docs" / "coming_from.md").read_text()
    assert page.split("<!-- defaults -->\n")[1].split("\n<!-- end -->")[0] == table
    assert table.count("\n") >= 7


def test_random_actions_are_measured_with_one_agent_and_with_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    results = importlib.import_module("results")
    game = results.play_randomly(results.env_config({"env": "lit_rl.envs.cooperation:TwoStepGame"}))
    assert abs(game["return_mean"] - 4.75) < 1.0  # half of them 7, half the mean of 0, 1, 1 and 8
    assert 15 < results.play_randomly(results.env_config({"env": "CartPole-v1"}))["return_mean"] < 30


def test_scores_are_in_the_form_of_dreamers_author_and_up_to_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    scores = importlib.import_module("scores")
    curve = {"rollout/return_mean": [[500.0, 9.5], [1000.0, 20.25]], "eval/return_mean": [[1000.0, 30.0]]}
    made_up = {"runs": [{"seed": 3, "return_mean": 30.0, "curve": curve}]}
    for recipe in ("dreamer_cartpole_swingup", "dreamer_pendulum", "ppo_pendulum", "dreamer_speed"):
        (tmp_path / f"{recipe}.json").write_text(json.dumps(made_up))
    names = ["dmc_proprio-lit_rl_dreamerv3.json.gz", "gym-lit_rl_dreamerv3.json.gz"]
    assert [path.name for path in scores.write(tmp_path)] == names
    expected = {"method": "lit_rl_dreamerv3", "seed": 3, "ys": [9.5, 20.25]}
    swingup, pendulum = (scores.read(tmp_path / "scores" / name) for name in names)
    assert swingup == [{"task": "dmc_cartpole_swingup", **expected, "xs": [1000, 2000]}]  # frames: 2 of an env step
    assert pendulum == [{"task": "gym_pendulum", **expected, "xs": [500, 1000]}]
    written = {path.name: scores.read(path) for path in (scores.RESULTS / "scores").iterdir()}
    current = {f"{suite}-{scores.METHOD}.json.gz": runs for suite, runs in scores.scores().items()}
    assert written == current, "run benchmarks/scores.py"
