"""SIGTERM, SIGINT and SIGUSR1: the batch is finished and a checkpoint written, from which the run goes on unchanged."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from envs import CycleEnv
from helpers import Forked, assert_same, quiet_trainer

from lit_rl import PPO, Evaluation, RolloutDataModule, cli
from lit_rl.learner.signals import SIGNALS

RUN = [
    "fit", "--config", "ppo_cartpole", "--data.env", "envs:SlowCycleEnv", "--data.num_envs_per_env_runner", "2",
    "--data.rollout_length", "5", "--data.rollouts_per_epoch", "4", "--data.max_env_steps", "300",
    "--data.evaluation.episodes", "2", "--model.minibatch_size", "5", "--model.num_epochs", "2",
    "--trainer.check_val_every_n_epoch", "1", "--trainer.enable_progress_bar", "false",
]  # fmt: skip
SEED = random.randrange(10_000)


def fit(make_trainer: Any, *callbacks: L.Callback, path: Any = None, **options: Any) -> tuple[PPO, L.Trainer]:
    """Rollouts end where episodes do: a resumed run has the same ones."""
    data = RolloutDataModule(
        CycleEnv, num_envs_per_env_runner=2, rollout_length=5, rollouts_per_epoch=3, max_env_steps=90,
        evaluation=Evaluation(episodes=2),
        seed=0,
    )  # fmt: skip
    algorithm, trainer = PPO(minibatch_size=5, num_epochs=2), make_trainer(callbacks=list(callbacks), **options)
    trainer.fit(algorithm, data, ckpt_path=path)
    return algorithm, trainer


@pytest.fixture(scope="module")
def unbroken() -> tuple[Any, Any, int, int]:
    """Weights, optimizer, gradient steps and epochs of a run that nothing interrupts."""
    torch.set_num_threads(1)
    algorithm, trainer = fit(quiet_trainer)
    return algorithm.state_dict(), trainer.optimizers[0].state_dict(), trainer.global_step, trainer.current_epoch


class Send(L.Callback):
    """Sends this process a signal in the middle of a hook."""

    def __init__(self, number: int, hook: str, updates: int):
        self._number, self._updates, self.sent = number, updates, False
        setattr(self, hook, self._send)

    def _send(self, trainer: L.Trainer, algorithm: PPO, *_: object) -> None:
        if algorithm.updates_done == self._updates and not self.sent:
            self.sent = True
            signal.raise_signal(self._number)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    ("hook", "updates", "saved"),
    [
        ("on_train_batch_start", 3, 4),  # the first batch of the second epoch
        ("on_train_batch_start", 4, 5),
        ("on_train_batch_start", 5, 6),  # its last, after which it is evaluated
        ("on_validation_batch_end", 6, 6),
        ("on_train_batch_start", 8, 9),  # the last of the run
        ("on_validation_batch_end", 9, 9),
    ],
)
def test_a_run_that_is_interrupted_and_resumed_equals_an_unbroken_one(
    make_trainer, unbroken: tuple, tmp_path: Path, number: int, hook: str, updates: int, saved: int
) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    weights, optimizer, global_step, current_epoch = unbroken
    with pytest.raises(SystemExit) as ended:
        fit(make_trainer, Send(number, hook, updates))
    assert ended.value.code == 128 + number
    assert [signal.getsignal(each) for each in SIGNALS] == before
    checkpoint = torch.load(tmp_path / "interrupted.ckpt", weights_only=True)
    assert int(checkpoint["state_dict"]["updates"]) == saved
    resumed, trainer = fit(make_trainer, path=tmp_path / "interrupted.ckpt")
    assert_same(resumed.state_dict(), weights)
    assert_same(trainer.optimizers[0].state_dict(), optimizer)
    assert trainer.global_step == global_step
    if saved < 9:  # else there was nothing left to train
        assert trainer.current_epoch == current_epoch


def test_a_program_keeps_its_own_handler_of_sigusr1(make_trainer) -> None:
    received = []
    previous = signal.signal(signal.SIGUSR1, lambda *_: received.append(1))
    try:
        algorithm, _ = fit(make_trainer, Send(signal.SIGUSR1, "on_train_batch_start", 4))
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert received == [1] and algorithm.updates_done == 9


STEP_S = "0.02"


def start(folder: Path, *more: str) -> subprocess.Popen:
    environment = os.environ | {"STEP_S": STEP_S, "RUN_OF_TEST": str(folder)}
    return subprocess.Popen(
        [sys.executable, "-m", "lit_rl", *RUN, *more], cwd=folder, env=environment, stderr=subprocess.PIPE, text=True
    )


class Started:
    """The command in a process of its own."""

    def __init__(self, folder: Path, *more: str):
        self._process = start(folder, *more)
        self.poll, self.send_signal = self._process.poll, self._process.send_signal

    def end(self) -> tuple[int, str]:
        _, errors = self._process.communicate(timeout=500)
        return self._process.returncode, errors


def processes_of(folder: Path) -> Iterator[str]:
    mark = f"RUN_OF_TEST={folder}".encode()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (path / "environ").read_bytes():
                yield (path / "cmdline").read_text()
        except OSError:
            pass


def nothing_left_of(folder: Path, timeout_s: float = 10.0) -> bool:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if not list(processes_of(folder)):
            return True
        time.sleep(0.2)
    return False


@pytest.mark.slow
@pytest.mark.ray
def test_the_command_stops_at_signals_and_goes_on_from_its_newest_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    cases = {tmp_path / f"run-{i}": number for i, number in enumerate(SIGNALS * 2)}
    with_ray = tmp_path / "run-0"
    for folder in cases:
        folder.mkdir()
    started: dict[Path, Any] = {folder: Forked(folder, RUN, STEP_S=STEP_S) for folder in list(cases)[2:]}
    started[tmp_path / "run-1"] = Started(tmp_path / "run-1")
    started[with_ray] = Started(with_ray, "--data.num_env_runners", "1")
    waiting = dict(started)
    while waiting:
        time.sleep(0.05)
        for folder, process in list(waiting.items()):
            assert process.poll() is None, process.end()
            if any(len(path.read_text().splitlines()) > 1 for path in folder.rglob("metrics.csv")):
                time.sleep(rng.uniform(0, 0.3))
                process.send_signal(cases[folder])
                del waiting[folder]
    (tmp_path / "whole").mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    cli.main(RUN)
    last = Path("runs/ppo_cartpole/version_0/checkpoints/last.ckpt")
    whole = torch.load(last, weights_only=True)
    for folder, number in cases.items():
        code, errors = started[folder].end()
        assert code == 128 + number, errors
        assert "training was stopped. To go on: ckpt_path=" in errors
        assert nothing_left_of(folder)
        monkeypatch.chdir(folder)
        (path,) = Path().rglob("interrupted.ckpt")
        assert 0 < int(torch.load(path, weights_only=True)["state_dict"]["updates"]) < 30
        cli.main([*RUN, "--ckpt_path", "last"])
        resumed = torch.load(str(last).replace("version_0", "version_1"), weights_only=True)
        assert int(resumed["state_dict"]["env_steps"]) == 300
        if folder != with_ray:  # an actor's action noise begins anew
            assert_same(resumed["state_dict"], whole["state_dict"])
            assert_same(resumed["optimizer_states"], whole["optimizer_states"])


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("num_env_runners", ["0", "1"])
def test_a_second_signal_ends_the_process_at_once(tmp_path: Path, num_env_runners: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    process = start(folder, "--data.num_env_runners", num_env_runners, "--data.env", "envs:StuckCycleEnv")
    while not (folder / "stuck").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert any(line == "SIGTERM: stopping after this batch; once more stops at once.\n" for line in process.stderr)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=300) == 128 + signal.SIGINT  # the step never ends
    assert nothing_left_of(folder)
    assert not list(folder.rglob("interrupted.ckpt"))
