"""Imports point one way, and what is heavy is loaded on first use."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lit_rl

ROOT = Path(__file__).resolve().parent.parent
OUTER = ("modules", "datamodules", "callbacks")
ENTRY_POINTS = {ROOT / "lit_rl" / "__init__.py", ROOT / "lit_rl" / "cli.py"}  # the lazy front door; the command line
CORE = sorted(p for p in (ROOT / "lit_rl").rglob("*.py") if p.relative_to(ROOT / "lit_rl").parts[0] not in OUTER)


def imports(node: ast.AST) -> Iterator[str]:
    """Every module a file imports, also inside functions, but not for type checkers alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "relative imports hide which layer they reach"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        else:
            yield from imports(child)


def reached(path: Path) -> set[str]:
    """Which of the three outer folders a file imports, by their own names or through `from lit_rl import PPO`."""
    names = [
        name.removeprefix("lit_rl.") for name in imports(ast.parse(path.read_text())) if name.startswith("lit_rl.")
    ]
    return {lit_rl._PUBLIC.get(name, name).removeprefix("lit_rl.").split(".")[0] for name in names} & set(OUTER)


@pytest.mark.parametrize("path", [path for path in CORE if path not in ENTRY_POINTS], ids=lambda p: p.name)
def test_the_core_imports_no_algorithm_no_batch_source_and_no_callback(path: Path) -> None:
    assert reached(path) == set()


def test_the_front_door_imports_nothing_of_lit_rl_but_for_type_checkers() -> None:
    names = list(imports(ast.parse((ROOT / "lit_rl" / "__init__.py").read_text())))
    assert not [name for name in names if name.startswith("lit_rl")]


def test_the_command_line_alone_knows_all_three() -> None:
    assert reached(ROOT / "lit_rl" / "cli.py") == set(OUTER)


@pytest.mark.parametrize("folder", OUTER)
def test_the_three_outer_folders_do_not_import_each_other(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    assert {path.name: reached(path) - {folder} for path in files} == {path.name: set() for path in files}


def loaded_after(statement: str, *packages: str) -> set[str]:
    """Which of `packages` a fresh interpreter has loaded after a statement."""
    code = f"{statement}; import sys; print(*(set({packages!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("statement", "packages"),
    [
        ("import lit_rl", ("torch", "lightning", "ray", "tensordict", "wandb", "numpy", "gymnasium")),
        ("import lit_rl.runners.env_runner, lit_rl.policy", ("lightning", "tensordict", "ray", "torchrl", "wandb")),
        ("from lit_rl import load_policy", ("lightning", "tensordict", "ray", "torchrl", "wandb")),
        ("import lit_rl.cli", ("ray", "torchrl", "wandb", "pyarrow", "tensorboard")),
    ],
)
def test_import_leaves_what_is_heavy_for_later(statement: str, packages: tuple[str, ...]) -> None:
    assert loaded_after(statement, *packages) == set()
