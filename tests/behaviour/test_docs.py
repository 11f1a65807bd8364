"""What the documentation shows runs: README.md and docs/*.md, block by block, and the doctests.

A ```python block runs by itself in an empty folder; ```python ray ones need Ray. The `lit-rl` and `python` lines of a
page's ```bash blocks run in order in a folder that holds the recipes, `fit` with a small budget. A ```yaml block that
has a `model` and a `data` is a config the command line takes. ```text is not run.
"""

import doctest
import importlib.util
import os
import pkgutil
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from helpers import ROOT, CommandServer

import lit_rl

sys.path.insert(0, str(ROOT / "docs"))

from make_tables import TABLE, table, with_tables

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BUDGET = 2048  # env steps of each `fit` line; one that resumes a run gets more, so that there is something to do


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    text: str


def read_blocks(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for match in re.finditer(r"^```([\w ]*)\n(.*?)^```$", text, re.M | re.S):
        yield Block(page, text.count("\n", 0, match.start()) + 1, match[1].strip(), match[2])


BLOCKS = [block for page in PAGES if page.exists() for block in read_blocks(page)]


def each_block(language: str, all_quick: bool = True) -> pytest.MarkDecorator:
    """Every block of a language; where not all are quick, the quickstart's first is."""
    found = [block for block in BLOCKS if block.language == language]
    firsts = {block.page.name: block for block in reversed(found)}
    quick = [all_quick or firsts["quickstart.md"] is block for block in found]
    cases = [pytest.param(b, marks=[] if q else pytest.mark.slow) for b, q in zip(found, quick)]
    return pytest.mark.parametrize("block", cases, ids=[f"{b.page.relative_to(ROOT)}:{b.line}" for b in found])


def command_lines(page: Path) -> list[list[str]]:
    """The `lit-rl` and `python` lines of a page's bash blocks as argument lists, with the budget of a test."""
    text = "\n".join(block.text for block in BLOCKS if block.page == page and block.language == "bash")
    lines = [shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines()]
    lines = [line for line in lines if line and line[0] in ("lit-rl", "python")]
    budget = BUDGET
    for line in lines:
        if "fit" in line:
            budget += BUDGET if "--ckpt_path" in line else 0
            line += ["--data.max_updates" if "OfflineDataModule" in line else "--data.max_env_steps", str(budget)]
    return lines


def test_readme_shows_both_ways_to_run() -> None:
    languages = {block.language for block in BLOCKS if block.page.name == "README.md"}
    assert {"python", "bash"} <= languages


def test_every_block_says_whether_it_is_run() -> None:
    known = {"python", "python ray", "bash", "yaml", "text"}
    assert [block for block in BLOCKS if block.language not in known] == []
    for page in PAGES:
        fences = re.findall(r"^\s*```", page.read_text(), re.M)  # also those in lists, which would not be found
        assert len(fences) == 2 * sum(block.page == page for block in BLOCKS), page


@each_block("python", all_quick=False)
def test_python_block_runs(block: Block, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    code = "\n" * block.line + block.text  # so that tracebacks show the page's line
    exec(compile(code, str(block.page), "exec"), {"__name__": f"docs_line_{block.line}"})
    if block.page.name == "README.md":  # it shows that something was learned
        assert float(capsys.readouterr().out.split()[-1]) >= 475.0


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
@each_block("python ray")
def test_python_block_with_ray_runs(
    block: Block, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    test_python_block_runs(block, monkeypatch, capsys)


@pytest.fixture
def run(command_server: CommandServer, tmp_path: Path) -> Callable[[list[str]], None]:
    """Runs one command in tmp_path, which holds the recipes; it must succeed."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")

    def run(command: list[str]) -> None:
        code, output = command_server.run(tmp_path, command)
        assert code == 0, f"{shlex.join(command)}\n{output[-3000:]}"

    return run


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if command_lines(p)], ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_a_page_run_in_order(page: Path, run: Callable[[list[str]], None]) -> None:
    for line in command_lines(page):
        run(line)


@each_block("yaml")
def test_yaml_block_is_yaml(block: Block) -> None:
    assert isinstance(yaml.safe_load(block.text), dict)


@pytest.mark.slow
@each_block("yaml")
def test_yaml_block_is_a_config_the_command_line_takes(
    block: Block, tmp_path: Path, run: Callable[[list[str]], None]
) -> None:
    if not {"model", "data"} <= set(yaml.safe_load(block.text)):
        pytest.skip("a part of a config")
    (tmp_path / "block.yaml").write_text(block.text)
    run(["lit-rl", "fit", "--config", "block.yaml", "--print_config"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        file = (page.parent / name) if name else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_of_options_are_those_that_make_docs_writes(page: Path) -> None:
    text = page.read_text()
    assert text.count("<!-- options of") == len(TABLE.findall(text)), "a table has no end"
    assert with_tables(text) == text


def test_there_is_a_table_for_every_class_whose_options_are_documented() -> None:
    tables = [names for page in PAGES for _, names, chosen, _ in TABLE.findall(page.read_text()) if not chosen]
    assert sorted(", ".join(tables).split(", ")) == [
        "APPO", "BC", "CQL", "DQN", "DiscreteCQL", "DreamerV3", "Evaluation", "FaultTolerance", "IMPALA", "IQL",
        "MARWIL", "MultiAgent", "OfflineDataModule", "OfflineEvaluation", "PPO", "Placement", "Rainbow", "Record",
        "ReplayDataModule", "RolloutDataModule", "SAC", "TQC", "cli.cluster.Cluster",
    ]  # fmt: skip


def test_a_table_has_defaults_limits_and_what_docstrings_say_also_of_parents() -> None:
    rows = table(["DQN", "Rainbow"]).splitlines()
    assert rows[:2] == ["| name | default | values | meaning |", "|---|---|---|---|"]
    assert "| `gamma` | `0.99` | a number, at least 0 and at most 1 | discount per env step; 0.9 to 0.999 |" in rows
    (noisy,) = [row for row in rows if row.startswith("| `noisy`")]
    assert noisy.startswith("| `noisy` | `False`; Rainbow: `True` | True or False | explore by noise on the head's")
    (dropped,) = table(["SAC", "TQC"], ["num_dropped"]).splitlines()[2:]
    assert dropped.startswith("| `num_dropped` | TQC: `2` | a whole number of at least 0 | greatest quantiles left out")
    (budget, size) = table(["ReplayDataModule"], ["max_env_steps", "buffer_size"]).splitlines()[2:]
    assert budget.startswith("| `max_env_steps` | `None` | a whole number of at least 1, or None | the budget, summed")
    assert size.startswith("| `buffer_size` | `100_000` | a whole number of at least 1 | rows of the buffer")
    assert with_tables("a\n<!-- options of PPO: lr -->\nold\n<!-- end -->\nb") == (
        "a\n<!-- options of PPO: lr -->\n" + table(["PPO"], ["lr"]) + "<!-- end -->\nb"
    )


MODULES = [module.name for module in pkgutil.walk_packages(lit_rl.__path__, "lit_rl.") if "__main__" not in module.name]
WITH_DOCTESTS = [name for name in MODULES if ">>> " in Path(importlib.util.find_spec(name).origin).read_text()]


@pytest.mark.parametrize("name", WITH_DOCTESTS)
def test_doctests_of_a_module_hold(name: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert not failed  # the captured output shows the examples


def test_the_pure_functions_have_doctests() -> None:
    for name in ("lit_rl.losses", "lit_rl.returns"):
        module = importlib.import_module(name)
        examples = {test.name for test in doctest.DocTestFinder().find(module) if test.examples}
        functions = {f"{name}.{f.__name__}" for f in vars(module).values() if getattr(f, "__module__", "") == name}
        assert functions <= examples
