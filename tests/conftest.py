"""Shared by all tests: one thread, quiet logs, own folders, a Trainer that leaves nothing behind."""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping

sys.path.insert(0, str(Path(__file__).parent))  # `import envs`
# A process that a test starts has one thread too: weights made by two differ from those made by one in the last bit.
os.environ["OMP_NUM_THREADS"] = "1"
# Ray's actors import the test environments too.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
os.environ.setdefault("WANDB_MODE", "offline")
warnings.filterwarnings("ignore", category=UserWarning, module="lightning")
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="the long form of the chaos tests")
    parser.addoption("--chaos-seed", type=int, help="what is broken at random, and when, as in the run with this seed")


@pytest.fixture(autouse=True)
def _one_thread_and_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., L.Trainer]:
    """A Trainer on the CPU that logs, saves and shows nothing unless asked."""

    def make(**kwargs: Any) -> L.Trainer:
        quiet = {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": -1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "default_root_dir": tmp_path,
        }
        return L.Trainer(**quiet | kwargs)

    return make


def until(return_: float) -> L.Callback:
    """Ends training once an evaluation, which comes after each epoch, has this mean return."""
    return EarlyStopping(
        "eval/return_mean", mode="max", stopping_threshold=return_, patience=10**6, check_on_train_epoch_end=False
    )


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray for all tests that need one, gone at the end."""
    import ray

    from lit_rl.runners import ray_session

    ray_session.connect()
    yield
    ray.shutdown()
