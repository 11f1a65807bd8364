"""Imports point one way, and what is heavy is loaded on first use."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from helpers import ROOT, run_python

import lit_rl

OUTER = ("modules", "datamodules", "callbacks")
FRONT_DOOR = ROOT / "lit_rl" / "__init__.py"  # names, loaded on first use
ENTRY_POINTS = {FRONT_DOOR, ROOT / "lit_rl" / "cli" / "program.py"}  # these two alone know the outer folders
CORE = sorted(p for p in (ROOT / "lit_rl").rglob("*.py") if p.relative_to(ROOT / "lit_rl").parts[0] not in OUTER)


def import_name(path: Path) -> str:
    """How a file is imported: "lit_rl.modules.ppo" for modules/ppo.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "lit_rl" else ("lit_rl", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    import_name(path): path for path in [*CORE, *(path for top in OUTER for path in sorted((ROOT / top).rglob("*.py")))]
}


def imports(path: Path) -> Iterator[str]:
    """Every name a file imports, also inside functions and, but for the front door, for type checkers alone."""
    tree = ast.parse(path.read_text())
    if path == FRONT_DOOR:
        tree.body = [x for x in tree.body if not (isinstance(x, ast.If) and ast.unparse(x.test) == "TYPE_CHECKING")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide which layer they reach"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def packages(module: str) -> set[str]:
    """The packages a module lies in: "lit_rl" and "lit_rl.runners" for "lit_rl.runners.pool"."""
    parts = module.split(".")
    return {".".join(parts[:i]) for i in range(1, len(parts))}


def imported_modules(path: Path) -> set[str]:
    """The modules of lit_rl that a file imports, with the packages they lie in; `from lit_rl import PPO` is one too."""
    importer, found = import_name(path), set()
    for name in imports(path):
        first, _, rest = name.partition(".")
        if first == "lit_rl":
            name = lit_rl.PUBLIC.get(rest, name)
            while name not in MODULES:
                name = name.rpartition(".")[0]
            found |= {name} | (packages(name) - packages(importer) - {importer})
    return found


GRAPH = {module: imported_modules(path) for module, path in MODULES.items()}


def reached(path: Path) -> set[str]:
    """Which of the three outer folders a file imports, by their own names or through `from lit_rl import PPO`."""
    return {module.split(".")[1] for module in GRAPH[import_name(path)] if "." in module} & set(OUTER)


def test_no_module_imports_itself_through_others() -> None:
    TopologicalSorter(GRAPH).prepare()  # raises with the circle, if there is one


def test_nothing_but_the_front_door_imports_for_type_checkers_alone() -> None:
    assert [name for name, path in MODULES.items() if "TYPE_CHECKING" in path.read_text()] == ["lit_rl"]


@pytest.mark.parametrize("path", [path for path in CORE if path not in ENTRY_POINTS], ids=lambda p: p.name)
def test_the_core_imports_no_algorithm_no_batch_source_and_no_callback(path: Path) -> None:
    assert reached(path) == set()


def test_the_front_door_imports_nothing_of_lit_rl_but_for_type_checkers() -> None:
    assert not [name for name in imports(FRONT_DOOR) if name.startswith("lit_rl")]


def test_the_command_line_alone_knows_all_three() -> None:
    assert reached(ROOT / "lit_rl" / "cli" / "program.py") == set(OUTER)


@pytest.mark.parametrize("folder", OUTER)
def test_the_three_outer_folders_do_not_import_each_other(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    assert {path.name: reached(path) - {folder} for path in files} == {path.name: set() for path in files}


def chains(start: str) -> dict[str, str]:
    """All modules that one imports, itself or through others, and how: "lit_rl.modules.ppo > lit_rl.algorithm"."""
    found, modules = {start: start}, [start]
    for module in modules:
        for name in sorted(GRAPH[module] - found.keys()):
            found[name] = f"{found[module]} > {name}"
            modules.append(name)
    return found


@pytest.mark.parametrize("algorithm", [name for name in MODULES if name.startswith("lit_rl.modules.")])
def test_algorithms_reach_neither_env_runners_nor_environments(algorithm: str) -> None:
    unwanted = {"lit_rl.runners", "lit_rl.envs"}
    assert [chain for name, chain in chains(algorithm).items() if unwanted & (packages(name) | {name})] == []


TRAINING = """
import lightning as L
from lit_rl import PPO, Evaluation, RolloutDataModule
data = RolloutDataModule("CartPole-v1", max_env_steps=512, rollout_length=16, seed=0, evaluation=Evaluation(episodes=2))
trainer = L.Trainer(accelerator="cpu", max_epochs=-1, logger=False, enable_progress_bar=False)
trainer.fit(PPO(minibatch_size=64), data)
trainer.validate(trainer.model, data)
assert trainer.model.env_steps == 512
"""
# One after the other in one interpreter: what must not have been loaded after it.
HEAVY = {
    "import lit_rl": {"torch", "lightning", "ray", "tensordict", "wandb", "numpy", "gymnasium"},
    "import lit_rl.runners.env_runner, lit_rl.policy": {"lightning", "tensordict", "ray", "torchrl", "wandb"},
    "from lit_rl import load_policy": {"lightning", "tensordict", "ray", "torchrl", "wandb"},
    "import lit_rl.cli": {"ray", "torchrl", "wandb", "pyarrow", "tensorboard"},
    TRAINING: {"ray", "torchrl", "wandb"},
}


@pytest.mark.slow
def test_imports_and_training_in_process_leave_what_is_heavy_for_later(tmp_path: Path) -> None:
    code = "import sys\n" + "".join(f"{part}\nprint('\\nLOADED', *sys.modules)\n" for part in HEAVY)
    lines = [line for line in run_python("-c", code, cwd=tmp_path).stdout.splitlines() if line.startswith("LOADED ")]
    for (part, packages), line in zip(HEAVY.items(), lines, strict=True):
        assert packages & set(line.split()) == set(), part
