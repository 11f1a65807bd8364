"""The comparison with rivals: an interpreter without them is refused, and the table is right."""

import importlib.metadata
import json
import re
import sys
from types import ModuleType

import pytest
from helpers import ROOT


@pytest.fixture
def rivals(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("rivals")


def test_an_interpreter_without_the_rivals_is_refused_in_one_sentence(
    rivals: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(rivals.PACKAGES, "rlox", "no_such_package")
    words = re.escape("expected an interpreter with no_such_package, got ModuleNotFoundError: No module named")
    with pytest.raises(ValueError, match=words):
        rivals.versions_of_rivals(sys.executable, {"lit_rl", "rlox"})
    with pytest.raises(ValueError, match=re.escape("--python no/python: expected an interpreter, got ")):
        rivals.versions_of_rivals("no/python", {"rlox"})


def test_the_versions_are_those_of_the_interpreter_that_is_named(
    rivals: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(rivals.PACKAGES, "rlox", "json")
    versions = rivals.versions_of_rivals(sys.executable, {"lit_rl", "rlox"})
    assert versions["torch"] == importlib.metadata.version("torch")


def test_ratios_are_made_within_each_round(rivals: ModuleType) -> None:
    speeds = {"lit_rl": [10.0, 30.0, 20.0], "lit_rl, compiled": [20.0, 60.0, 20.0], "sbx": [20.0, 20.0, 40.0]}
    found = rivals.with_ratios(speeds)
    assert found["ratios"] == {"lit_rl / sbx": [0.5, 1.5, 0.5], "lit_rl, compiled / sbx": [1.0, 3.0, 0.5]}
    assert rivals.table({"dqn": found}).splitlines()[2:] == [
        "| dqn | lit_rl | 20 |  |  |",
        "| dqn | lit_rl, compiled | 20 |  |  |",
        "| dqn | sbx | 20 | 0.50 | 1.00 |",
    ]


def test_the_table_in_the_docs_is_the_one_that_was_measured(rivals: ModuleType) -> None:
    page = (ROOT / "docs" / "coming_from.md").read_text()
    measured = json.loads(rivals.OUT.read_text())["tasks"]
    assert page.split("<!-- rivals -->\n")[1].split("\n<!-- end -->")[0] == rivals.table(measured)
    assert measured.keys() == rivals.TASKS.keys()


def test_each_task_compares_lit_rl_with_rivals(rivals: ModuleType) -> None:
    for _, systems in rivals.TASKS.values():
        assert {"lit_rl", "lit_rl, compiled", "SB3", "sbx"} <= systems.keys()
        assert systems.keys() - {"lit_rl", "lit_rl, compiled"} <= rivals.PACKAGES.keys()


def test_the_comparison_with_d3rlpy_has_students_interval_and_ratios_seed_by_seed(rivals: ModuleType) -> None:
    found = importlib.import_module("d3rlpy_offline").compared(
        {
            "lit_rl": [{"return_mean": x, "updates_per_cpu_s": speed} for x, speed in ((-1, 30), (-2, 40), (-3, 90))],
            "d3rlpy": [{"return_mean": x, "updates_per_cpu_s": speed} for x, speed in ((-4, 20), (-4, 20), (-7, 30))],
        }
    )
    assert found["ratios"] == [1.5, 2.0, 3.0] and found["median_ratio"] == 2.0
    assert found["lit_rl"]["return_mean"] == -2.0 and found["d3rlpy"]["updates_per_cpu_s"] == 20
    assert found["lit_rl"]["interval"] == [-4.5, 0.5]  # -2 +- 4.303 / sqrt(3)
