"""Training that goes on while things are killed, broken and stalled, and ends with what it would have had.

Every test has a short form, and a long one for `make chaos`. The seed of what is done at random is printed;
`--chaos-seed` does it again.
"""

import csv
import gc
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import lightning as L
import numpy as np
import pytest
import torch
import yaml
from envs import CounterEnv
from helpers import Forked

from lit_rl import PPO, FaultTolerance, RolloutDataModule

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(1500)]
OPTIONS = {
    "lr": 1e-3, "num_epochs": 8, "minibatch_size": 128, "gae_lambda": 0.95, "gamma": 0.98, "clip": 0.2,
}  # fmt: skip
MANY = FaultTolerance(max_restarts=1_000_000)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    seed = request.config.getoption("--chaos-seed")
    seed = random.SystemRandom().randrange(2**31) if seed is None else seed
    print(f"--chaos-seed {seed}")
    return random.Random(seed)


@pytest.fixture
def long(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--long")


class Killer(L.Callback):
    """Kills a random env runner every few seconds.

    Attributes:
        kills: how many were.
        lags: how far behind the weights of each batch were.
        recoveries: seconds from a kill to the killed runner's next fragment.
    """

    def __init__(self, every_s: float, rng: random.Random):
        self._every_s, self._rng = every_s, rng
        self._next = time.monotonic() + 1.0
        self._missing: dict[int, float] = {}
        self.kills, self.lags, self.recoveries = 0, [], []  # type: ignore[var-annotated]

    def on_train_batch_start(self, trainer: L.Trainer, module: PPO, batch: Any, batch_idx: int) -> None:
        now = time.monotonic()
        self.lags.append(module.updates_done - int(batch["policy_version"].min()))
        pool = trainer.datamodule._pool
        for runner, since in list(self._missing.items()):
            slot = pool._slots[runner]
            if slot.size and slot.incarnation and since:
                self.recoveries.append(now - since)
                del self._missing[runner]
        if now > self._next:
            pids = pool.pids()
            if len(pids) == len(pool._slots):
                runner = self._rng.randrange(len(pids))
                os.kill(pids[runner], signal.SIGKILL)
                pool._slots[runner].size = 0
                self._missing[runner] = now
                self.kills += 1
                self._next = now + self._every_s


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_learning_survives_runners_that_are_killed_all_the_time(
    rng: random.Random, long: bool, make_trainer: Callable
) -> None:
    """FT1."""
    data = RolloutDataModule(
        "CartPole-v1", num_env_runners=2, num_envs_per_env_runner=8, rollout_length=32, seed=1,
        max_env_steps=900_000 if long else 60_000, fault_tolerance=MANY, rollouts_per_epoch=20,
    )  # fmt: skip
    module, killer = PPO(**OPTIONS, lr_schedule="linear"), Killer(4.0 if long else 6.0, rng)
    make_trainer(limit_val_batches=0, callbacks=[killer]).fit(module, data)
    ledger = data.ledger
    print(f"{killer.kills} kills, recovered after {np.round(sorted(killer.recoveries), 1)} s, {dict(ledger.discarded)}")
    returns = [episode.return_ for episode in data._episodes]
    print(f"return {np.mean(returns):.1f} after {module.env_steps_done} env steps")
    assert killer.kills >= (10 if long else 1) and set(killer.lags) == {0}
    assert ledger.delivered == module.env_steps_done and set(ledger.discarded) <= {"died", "unread"}
    assert ledger.executed == ledger.delivered + ledger.discarded.total()
    assert np.mean(returns) >= (475 if long else 80)


class Fragile(gym.Wrapper):
    """Raises now and then."""

    rng = np.random.default_rng(0)

    def reset(self, **kwargs: Any) -> Any:
        if self.rng.random() < 0.01:
            raise RuntimeError("a broken reset")
        return super().reset(**kwargs)

    def step(self, action: Any) -> Any:
        if self.rng.random() < 0.001:
            raise RuntimeError("a broken step")
        return super().step(action)


def test_learning_survives_environments_that_raise(long: bool, make_trainer: Callable) -> None:
    """FT2."""
    data = RolloutDataModule(
        "CartPole-v1", wrappers=["test_chaos:Fragile"], num_envs_per_env_runner=8, rollout_length=64, seed=1,
        max_env_steps=150_000 if long else 30_000, fault_tolerance=MANY, rollouts_per_epoch=20,
    )  # fmt: skip
    module = PPO(**OPTIONS, lr_schedule="linear")
    logging.getLogger("lit_rl").setLevel(logging.ERROR)
    try:
        make_trainer(limit_val_batches=0).fit(module, data)
    finally:
        logging.getLogger("lit_rl").setLevel(logging.NOTSET)
    ledger, returns = data.ledger, [episode.return_ for episode in data._episodes]
    print(f"return {np.mean(returns):.1f}, {dict(ledger.discarded)}, {data.ledger.restarts} rebuilt")
    assert data.ledger.restarts > 20 and set(ledger.discarded) == {"env_error"}
    assert ledger.discarded["env_error"] < data.ledger.restarts  # a step that raised costs itself, a reset nothing
    assert ledger.delivered == module.env_steps_done
    assert np.mean(returns) >= (475 if long else 80)


# --- processes ------------------------------------------------------------------------------------------------------


def config(folder: Path, often: bool = True, **data: Any) -> Path:
    """A small run of the command line with a checkpoint after each epoch and, if `often`, after each batch."""
    path = folder / "run.yaml"
    options = {
        "num_envs_per_env_runner": 2,
        "rollout_length": 16,
        "rollouts_per_epoch": 4,
        "evaluation": {"episodes": 2},
    }
    checkpoint = {"filename": "last", "enable_version_counter": False, "save_on_train_epoch_end": True}
    every = {"filename": "often", "enable_version_counter": False, "every_n_train_steps": 4}
    text = {
        "seed_everything": 5,
        "model": {"class_path": "PPO", "init_args": {"minibatch_size": 16, "num_epochs": 2}},
        "data": {"class_path": "RolloutDataModule", "init_args": {"env": "CartPole-v1", **options, **data}},
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": str(folder), "name": "log"}},
            "callbacks": [
                {"class_path": "ModelCheckpoint", "init_args": init} for init in [checkpoint, every][: 1 + often]
            ],
        },
    }
    path.write_text(yaml.safe_dump(text))
    return path


def start(path: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "lit_rl", "fit", "--config", str(path), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LIT_RL_TEST": str(path)}
    return subprocess.Popen(
        command, cwd=path.parent, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def left_over(path: Path) -> list[str]:
    """Processes that carry the mark of a run, and are no zombies."""
    found, mark = [], f"LIT_RL_TEST={path}".encode()
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and mark in (process / "environ").read_bytes().split(b"\0"):
                words = (process / "cmdline").read_bytes().replace(b"\0", b" ").split()
                found.append(f"{process.name} {b' '.join(words)[:200].decode(errors='replace')}")
        except OSError:
            continue
    return found


def wait_for(condition: Callable[[], Any], seconds: float, what: str) -> float:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, f"{what} did not happen within {seconds} s"
        time.sleep(0.05)
    return time.monotonic() - started


def wait_for_the_end_of_all(path: Path, seconds: float) -> float:
    """Seconds until no process of a run was left."""
    started = time.monotonic()
    while left := left_over(path):
        assert time.monotonic() - started < seconds, f"left after {seconds} s: {left}"
        time.sleep(0.05)
    return time.monotonic() - started


def weights(folder: Path) -> dict[str, torch.Tensor]:
    newest = max(folder.rglob("last.ckpt"), key=lambda path: path.stat().st_mtime)
    return torch.load(newest, weights_only=True)["state_dict"]


def test_a_run_that_is_killed_again_and_again_ends_as_the_unbroken_one(
    rng: random.Random, long: bool, tmp_path: Path
) -> None:
    """RS1: SIGKILL at random moments; what is logged has no gap, and is the same wherever it is logged twice."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    steps = 32 * 4 * (150 if long else 60)
    # Not after each batch: one that is written between an epoch's last batch and its evaluation leaves that out.
    process = Forked(whole, ["fit", "--config", str(config(whole, often=False, max_env_steps=steps))])
    code, errors = process.end(300)
    assert code == 0, errors
    fit, kills, resume = ["fit", "--config", str(config(broken, often=False, max_env_steps=steps))], 0, []
    for _ in range(20 if long else 2):
        before = set(broken.rglob("metrics.csv"))
        process = Forked(broken, fit + resume)
        wait_for(lambda: process.poll() is not None or set(broken.rglob("metrics.csv")) - before, 500, "a log")  # noqa: B023
        time.sleep(rng.uniform(0.0, 0.5))
        if process.poll() is None:
            kills += 1
            process.send_signal(signal.SIGKILL)
        process.end()
        resume = ["--ckpt_path", "last"] if list(broken.rglob("*.ckpt")) else []
    assert kills
    code, errors = Forked(broken, fit + resume).end(300)
    assert code == 0, errors
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(broken)[name]), name
    unbroken, together = series(whole), series(broken)
    assert together.keys() == unbroken.keys()
    for key, values in together.items():
        assert values == unbroken[key], key


def series(folder: Path) -> dict[tuple[str, bool], set[tuple[tuple[str, str], ...]]]:
    """What was logged at each env step, in all of a run's logs."""
    found: dict[tuple[str, bool], set[tuple[tuple[str, str], ...]]] = {}
    for path in folder.rglob("metrics.csv"):
        with path.open() as file:
            for row in csv.DictReader(file):
                if row["env_steps"] and None not in row.values():  # the last line of a killed run may be cut
                    values = tuple((k, v) for k, v in sorted(row.items()) if v and not k.startswith("time/"))
                    found.setdefault((row["env_steps"], bool(row.get("eval/return_mean"))), set()).add(values)
    return found


@pytest.mark.ray
@pytest.mark.parametrize("victim", ["learner", "raylet"])
def test_nothing_is_left_when_the_learner_or_ray_is_killed(victim: str, tmp_path: Path) -> None:
    """FT7."""
    path = config(tmp_path, max_env_steps=10_000_000, num_env_runners=1)
    process = start(path)
    wait_for(lambda: list(tmp_path.rglob("often.ckpt")), 500, "a checkpoint")
    if victim == "learner":
        process.kill()
    else:
        pid = next(int(line.split()[0]) for line in left_over(path) if "raylet/raylet" in line)
        os.kill(pid, signal.SIGKILL)
    took = wait_for(lambda: process.poll() is not None, 300, "the end of the learner")
    assert process.returncode != 0
    gone = wait_for_the_end_of_all(path, 120)
    print(f"learner ended after {took:.1f} s, the last process {gone:.1f} s later")
    assert torch.load(next(tmp_path.rglob("often.ckpt")), weights_only=True)["state_dict"]


def test_a_learner_process_that_is_killed_ends_the_others(tmp_path: Path) -> None:
    """FT7, ddp."""
    path = config(tmp_path, max_env_steps=10_000_000)
    process = start(path, "--trainer.devices", "2", "--trainer.strategy", "ddp")
    wait_for(lambda: list(tmp_path.rglob("often.ckpt")), 500, "a checkpoint")
    children = [int(line.split()[0]) for line in left_over(path) if int(line.split()[0]) != process.pid]
    os.kill(children[0], signal.SIGKILL)
    took = wait_for(lambda: process.poll() is not None, 300, "the end of the other learner process")
    assert process.returncode != 0
    gone = wait_for_the_end_of_all(path, 120)
    print(f"ended after {took:.1f} s, the last process {gone:.1f} s later")


def test_an_environment_that_always_fails_ends_the_command_with_its_error(tmp_path: Path) -> None:
    """FT6."""
    path = config(tmp_path, env="test_chaos:Broken", max_env_steps=10_000)
    process = start(path, "--data.fault_tolerance.max_restarts", "3")
    _, stderr = process.communicate(timeout=500)
    lines = stderr.decode().strip().splitlines()
    assert process.returncode == 1
    sentence = "lit-rl: error: Env runner 0: env=test_chaos:Broken raised in step: RuntimeError: always"
    assert lines[-1].startswith(sentence)
    assert "max_restarts=3" in lines[-1] and not any("Traceback" in line for line in lines)


class Broken(CounterEnv):
    """Makes the one step of its trial, and no other."""

    trials = 0

    def step(self, action: int) -> tuple:
        Broken.trials += 1
        if Broken.trials > 1:
            raise RuntimeError("always")
        return super().step(action)


# --- soak -----------------------------------------------------------------------------------------------------------


LEAK = 0.5  # KiB per env step that are taken for a leak


class Tiny(CounterEnv):
    """A step costs next to nothing; may lose memory at each."""

    kept: list[bytes] = []

    def __init__(self, leak: int = 0):
        super().__init__()
        self._leak = leak

    def step(self, action: int) -> tuple:
        if self._leak:
            Tiny.kept.append(os.urandom(self._leak))
        return super().step(action)


class Gauge(L.Callback):
    """Env steps, memory (KiB), open files and threads of this process, a few times a second."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, int, int, int]] = []
        self._last = 0.0

    def on_train_batch_end(self, trainer: L.Trainer, module: PPO, *_: object) -> None:
        if time.monotonic() - self._last > 0.2:
            self._last = time.monotonic()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
            self.rows.append((module.env_steps_done, pages * 4, files, threads))


def slope(rows: list[tuple[int, int, int, int]]) -> float:
    """KiB per env step by Theil and Sen: the median of the slopes of all pairs, which single jumps do not move."""
    table = np.array(rows[:: max(1, len(rows) // 200)], np.float64)
    i, j = np.triu_indices(len(table), len(table) // 4)
    return float(np.median((table[j, 1] - table[i, 1]) / (table[j, 0] - table[i, 0])))


def soak(seconds: float, make_trainer: Callable, **env_kwargs: Any) -> Gauge:
    data = RolloutDataModule(
        Tiny, env_kwargs=env_kwargs, num_envs_per_env_runner=4, rollout_length=16, seed=0, rollouts_per_epoch=100_000
    )
    gauge = Gauge()
    trainer = make_trainer(
        limit_val_batches=0, callbacks=[gauge], max_time={"seconds": seconds}, enable_model_summary=False
    )
    trainer.fit(PPO(minibatch_size=64, num_epochs=1), data)
    return gauge


def test_memory_files_and_threads_stay_as_they_are(long: bool, make_trainer: Callable) -> None:
    """SO1; the long form runs for ten minutes."""
    seconds = 600 if long else 15
    gauge = soak(seconds, make_trainer)
    rows = gauge.rows[len(gauge.rows) // 4 :]
    growth, steps = rows[-1][1] - rows[0][1], rows[-1][0] - rows[0][0]
    per_minute = slope(rows) * steps / (0.75 * seconds / 60)
    print(
        f"{steps} env steps, {per_minute:.0f} KiB/min, {growth} KiB in all, files {rows[-1][2]}, threads {rows[-1][3]}"
    )
    assert growth < 5 * 1024 and slope(rows) < LEAK
    assert not long or per_minute < 50
    for column in (2, 3):
        assert abs(rows[-1][column] - rows[0][column]) <= 2


def test_a_leak_is_found(make_trainer: Callable) -> None:
    """SO2: one KiB per env step."""
    try:
        gauge = soak(10, make_trainer, leak=1024)
    finally:
        Tiny.kept.clear()
    rows = gauge.rows[len(gauge.rows) // 4 :]
    print(f"{slope(rows):.2f} KiB per env step")
    assert slope(rows) > LEAK


def test_fifty_runs_in_one_process_leave_nothing(make_trainer: Callable) -> None:
    """SO3."""

    def memory() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4

    def run() -> None:
        data = RolloutDataModule(Tiny, num_envs_per_env_runner=2, rollout_length=8, max_env_steps=16, seed=0)
        make_trainer(limit_val_batches=0).fit(PPO(minibatch_size=16, num_epochs=1), data)

    for _ in range(10):
        run()
    before, files, threads = memory(), len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(50):
        run()
    print(f"{memory() - before} KiB more")
    assert memory() - before < 5 * 1024
    assert len(os.listdir("/proc/self/fd")) <= files and threading.active_count() <= threads
