"""Shared by all tests: one thread, quiet logs, own folders, a Trainer that leaves nothing behind."""

import functools
import gc
import logging
import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers import TESTS, CommandServer, quiet_trainer
from lightning.fabric.utilities import registry

# Test files, and processes that they start, find each other by name, as in the environment "test_faults:Sometimes".
FOLDERS = [str(TESTS), *sorted({str(path.parent) for path in TESTS.glob("*/test_*.py")})]
sys.path[:0] = FOLDERS
os.environ["PYTHONPATH"] = os.pathsep.join([*FOLDERS, os.environ.get("PYTHONPATH", "")])
# A process that a test starts has one thread too: weights made by two differ from those made by one in the last bit.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("WANDB_MODE", "offline")
warnings.filterwarnings("ignore", category=UserWarning, module="lightning")
# The platform's default, said before torchrl is imported, which would choose "spawn" for all tests that come later.
multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0])
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
# Each Trainer asks all installed packages for callbacks of theirs: a twelfth of a short run.
registry.entry_points = functools.cache(registry.entry_points)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="the long form of the chaos tests")
    parser.addoption("--chaos-seed", type=int, help="what is broken at random, and when, as in the run with this seed")


def pytest_collection_finish() -> None:
    gc.freeze()  # half a million objects of modules and tests, which each full collection would look through


@pytest.fixture(autouse=True)
def _one_thread_and_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    monkeypatch.delenv("WANDB_SERVICE", raising=False)  # else processes log through that of an earlier test's run


@pytest.fixture
def make_trainer() -> Callable[..., L.Trainer]:
    """A Trainer on the CPU that logs, saves and shows nothing unless asked, and works in the test's folder."""
    return quiet_trainer


@pytest.fixture(scope="session")
def command_server() -> Iterator[CommandServer]:
    """One process that runs commands, gone at the end."""
    server = CommandServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray for all tests that need one, gone at the end."""
    import ray

    from lit_rl.runners import ray_session

    ray_session.connect()
    yield
    ray.shutdown()
