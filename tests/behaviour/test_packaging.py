"""What is installed: the three outer folders as sub-packages of lit_rl, recipes as data, nothing else."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT, run_python

import lit_rl

LINKS = ("modules", "datamodules", "callbacks", "recipes")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]


def packages_on_disk() -> dict[str, Path]:
    """Every folder with an `__init__.py`, by the name it is imported as. (`rglob` does not enter links.)"""
    folders = [
        init.parent.relative_to(ROOT) for top in ("lit_rl", *LINKS) for init in (ROOT / top).rglob("__init__.py")
    ]
    return {".".join(("lit_rl", *folder.parts)).replace("lit_rl.lit_rl", "lit_rl"): folder for folder in folders}


def folder_of(package: str) -> Path:
    """Where setuptools looks for a package: the nearest entry of package-dir."""
    parts = package.split(".")
    for i in range(len(parts), 0, -1):
        if ".".join(parts[:i]) in SETUPTOOLS["package-dir"]:
            return Path(SETUPTOOLS["package-dir"][".".join(parts[:i])], *parts[i:])
    raise AssertionError(f"{package} is below no entry of package-dir")


def test_every_package_on_disk_is_listed_and_found_where_it_lies() -> None:
    found = packages_on_disk()
    assert {"lit_rl", "lit_rl.runners", "lit_rl.modules"} <= set(found)
    assert set(SETUPTOOLS["packages"]) == set(found) | {"lit_rl.recipes"}  # data has no __init__.py
    assert {package: folder_of(package) for package in found} == found


@pytest.mark.parametrize("name", LINKS)
def test_link_is_relative_and_points_to_its_folder(name: str) -> None:
    link = ROOT / "lit_rl" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert link.resolve() == ROOT / name
    assert (ROOT / name).is_dir()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: the checkout stays clean, and nothing left in its build/ gets in."""
    copy, out = tmp_path_factory.mktemp("source") / "lit_rl", tmp_path_factory.mktemp("dist")
    unwanted = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__", "docs", "tests")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=unwanted)
    run_python("-m", "build", "--wheel", "--no-isolation", "--outdir", out, copy)
    (path,) = out.glob("*.whl")
    return path


@pytest.mark.slow
def test_wheel_holds_all_files_under_lit_rl_once(wheel: Path) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in names} == {"lit_rl"}
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "lit_rl").rglob("*.py")}
    for name in LINKS:
        pattern = "*.yaml" if name == "recipes" else "*.py"
        expected |= {f"lit_rl/{path.relative_to(ROOT)}" for path in (ROOT / name).rglob(pattern)}
    assert {"lit_rl/modules/ppo.py", "lit_rl/recipes/ppo_cartpole.yaml"} <= expected
    assert sorted(names) == sorted(expected | {"lit_rl/py.typed"})


@pytest.mark.slow
def test_wheel_runs_a_recipe_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    unpacked, cwd = tmp_path / "site", tmp_path / "elsewhere"
    cwd.mkdir()
    zipfile.ZipFile(wheel).extractall(unpacked)
    environment = os.environ | {"PYTHONPATH": str(unpacked)}  # comes before the editable install

    def run(*args: str) -> str:
        return run_python(*args, cwd=cwd, env=environment).stdout

    where = "import lit_rl, lit_rl.modules.ppo as ppo; print(lit_rl.__file__, ppo.__file__, flush=True)"
    arguments = (
        "--config ppo_cartpole --data.max_env_steps 1024 --data.evaluation.episodes 1 --trainer.logger false "
        "--trainer.callbacks null --trainer.enable_progress_bar false"
    )
    printed = run("-c", f"{where}; from lit_rl.cli import main; main()", "fit", *arguments.split())
    assert all(Path(file).is_relative_to(unpacked) for file in printed.splitlines()[0].split())
    listed = run("-m", "lit_rl", "recipes").splitlines()
    assert {path.stem for path in (ROOT / "recipes").glob("*.yaml")} <= {line.split(" ")[0] for line in listed}


@pytest.mark.slow
def test_make_train_ends_with_a_line_that_says_where_everything_is(tmp_path: Path) -> None:
    for name in ("Makefile", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv").symlink_to(Path(sys.executable).parent.parent)
    outside = {"MAKEFLAGS": "", "MAKELEVEL": ""}  # not as a part of `make test`
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | outside
    small = "--data.max_env_steps 4096 --data.rollouts_per_epoch 2 --trainer.check_val_every_n_epoch 1"
    command = ["make", "--assume-old=venv", "train", f"ARGS={small} --trainer.enable_progress_bar false"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    checkpoint, curve, log = (part.split(": ")[1] for part in done.stdout.splitlines()[-1].split(", "))
    run = Path("runs/ppo_cartpole/version_0")
    assert (Path(checkpoint).parent, Path(curve), Path(log)) == (
        run / "checkpoints", run / "curve.png", run / "metrics.csv",
    )  # fmt: skip
    assert (tmp_path / checkpoint).stat().st_size and (tmp_path / log).stat().st_size
    assert (tmp_path / curve).read_bytes().startswith(b"\x89PNG")


def test_the_two_places_that_say_the_version_agree() -> None:
    assert PYPROJECT["project"]["version"] == lit_rl.__version__


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [["-m", "lit_rl"], [str(Path(sys.executable).with_name("lit-rl"))]], ids=["module", "script"]
)
def test_module_and_console_script_start(command: list[str]) -> None:
    done = subprocess.run([sys.executable, *command, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, f"lit-rl {lit_rl.__version__}")
