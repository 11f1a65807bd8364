"""`benchmarks/gpu_check.sh`: in small on the CPU it does what it does on a GPU machine, which has no Ray."""

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import ROOT

SCRIPT = ROOT / "benchmarks" / "gpu_check.py"
ABSENT = ("ray", "torchrl", "wandb", "pettingzoo", "psutil", "jsonargparse", "ale_py", "mujoco")
FIGURES = {"env_steps_per_s", "updates_per_s", "gradient_steps_per_s", "learner_share"}


@pytest.fixture(scope="module")
def gpu_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    sys.modules["gpu_check"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def check(gpu_check: ModuleType, tmp_path: Path) -> Any:
    return gpu_check.Check(tmp_path, "cpu", True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_in_small_it_runs_without_a_gpu_and_without_ray(tmp_path: Path, gpu_check: ModuleType) -> None:
    absent, wheels, out = tmp_path / "absent", tmp_path / "wheels", tmp_path / "out"
    absent.mkdir()
    wheels.mkdir()
    for name in ABSENT:
        (absent / f"{name}.py").write_text(f"raise ModuleNotFoundError('no {name} on this machine')")
    with zipfile.ZipFile(wheels / "gymnasium-0.0.7-py3-none-any.whl", "w") as wheel:  # nothing but a version
        info = "gymnasium-0.0.7.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: gymnasium\nVersion: 0.0.7\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    done = subprocess.run(
        ["bash", ROOT / "benchmarks" / "gpu_check.sh", "out", "--device", "cpu", "--short"],
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(absent), "WHEELS": str(wheels)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr + (out / "gpu_check.log").read_text()
    found = json.loads((out / "gpu_check.json").read_text())
    assert found["machine"]["gymnasium"] == "0.0.7"  # the wheels come first, and are gone again
    assert found["tests"]["all"]["passed"] == 1 and not found["tests"]["all"]["failed"]
    rows = {(row["case"], row["form"]): row for row in found["rows"]}
    expected = {(name, form) for name in gpu_check.CASES for form in ("eager", "compiled", "bf16")}
    expected &= {(name, form) for name, case in gpu_check.CASES.items() for form in case.forms}
    expected -= {(name, "compiled") for name in gpu_check.CASES if name != gpu_check.COMPILED_IN_SHORT}
    assert rows.keys() == expected and len(found["rows"]) == len(expected) == 7
    for row in found["rows"]:
        assert all(row[name] > 0 for name in FIGURES) and row["learner_share"] < 1, row
    assert rows[gpu_check.COMPILED_IN_SHORT, "compiled"]["compilation_s"] > 0.5
    assert done.stdout.strip() == (out / "gpu_check.txt").read_text().strip()
    assert all(name in done.stdout for name in gpu_check.CASES)


def test_without_a_gpu_it_says_so(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", str(tmp_path / "out")])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        gpu_check.main()
    assert ended.value.code == 2 and "--device cuda: torch sees no GPU here" in capsys.readouterr().err


def test_a_form_that_raises_is_a_row_with_the_error_and_the_others_go_on(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def make(compile: bool, short: bool) -> Any:
        if compile:
            raise ValueError("cannot be\ncompiled")
        return gpu_check.off_policy(False, True, continuous=False)

    monkeypatch.setitem(gpu_check.CASES, "case", gpu_check.Case(make))
    gpu_check.run_forms("case", ["compiled", "eager"], "cpu", short=True, warm=True)
    found = gpu_check.results_in(capsys.readouterr().out)
    assert found["case", "compiled"] == {"error": "ValueError: cannot be"}
    assert found["case", "eager"].keys() == FIGURES


def test_a_process_that_hangs_is_ended_with_its_children(check: Any) -> None:
    code = "import subprocess; child = subprocess.Popen(['sleep', '60']); print(child.pid, flush=True); child.wait()"
    printed, failed = check.run(["-c", code], limit_s=1.5)
    assert failed == "not done within 2 s"
    stat, end = Path(f"/proc/{int(printed)}/stat"), time.monotonic() + 120
    with contextlib.suppress(OSError):  # it is gone
        while stat.read_text().split()[2] != "Z":
            assert time.monotonic() < end, "the child is left"
            time.sleep(0.05)
    assert check.run(["-c", "import sys; print('said'); sys.exit(3)"], limit_s=60.0) == ("said\n", "exit status 3")


def test_a_case_out_of_time_has_a_row_for_each_form_that_is_missing(
    check: Any, gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    printed = 'RESULT {"case": "DQN CartPole", "form": "eager", "env_steps_per_s": 1234.5}\n'
    monkeypatch.setattr(check, "run", lambda *_, **__: (printed, "not done within 9 s"))
    check.cases(["DQN CartPole"], "cpu", 1)
    monkeypatch.setattr(gpu_check, "LIMIT_S", 5.0)
    check.cases(["SAC 17 numbers, 6 actions"], "cpu", 1)
    rows = json.loads((tmp_path / "gpu_check.json").read_text())["rows"]
    assert [row.get("error") for row in rows] == [None, "not done within 9 s", "no time was left of 5 s"]
    text = gpu_check.table(check.found)
    assert "1,234" in text and "not done within 9 s" in text and "no time was left" in text


def test_a_failed_test_is_counted_and_named(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = (
        "tests/core/test_gpu.py::test_a[PPO with memory] PASSED [ 50%]\ntests/core/test_gpu.py::test_b FAILED [100%]\n"
    )
    monkeypatch.setattr(check, "run", lambda *_, **__: (printed, "exit status 1"))
    check.tests("all")
    assert check.found["tests"]["all"] == {
        "passed": 1, "failed": 1, "skipped": 0, "error": "exit status 1",
        "failures": ["tests/core/test_gpu.py::test_b"],
    }  # fmt: skip


def test_waits_of_the_host_are_counted(gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with gpu_check.host_waits() as found:
        for _ in range(3):  # from the same line: each counts
            warnings.warn(gpu_check.SYNCHRONISES, UserWarning, stacklevel=1)
        warnings.warn("something else", UserWarning, stacklevel=1)
    assert len(found) == 3 and modes == ["warn", "default"]
