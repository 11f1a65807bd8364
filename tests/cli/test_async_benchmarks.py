"""The benchmarks of asynchronous collection in small, with Ray's actors in this process."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import fake_ray
import pytest
from helpers import ROOT

sys.path.append(str(ROOT / "benchmarks"))  # they find each other by name

import async_faults
import async_scaling
import async_speed
import lag
import measuring

from lit_rl import IMPALA, RolloutDataModule
from lit_rl.envs.make import EnvConfig
from lit_rl.errors import OptionError


@pytest.fixture(autouse=True)
def _runners_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_ray.use(monkeypatch, 1.0, 1.001)


def test_figures_are_written_with_their_origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "OUT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["/any/where/async_scaling.py", "--runners", "1"])
    measuring.write("some.json", {"cells": [1]})
    found = json.loads((tmp_path / "some.json").read_text())
    assert found["command"] == ".venv/bin/python benchmarks/async_scaling.py --runners 1"
    assert {"commit", "machine", "versions"} < found.keys() and found["cells"] == [1]


def test_a_clock_begins_after_the_first_batches() -> None:
    clock = measuring.Clock(1000.0, 2, ["time/sample_s"])
    data = RolloutDataModule("CartPole-v1", num_envs_per_env_runner=2, rollout_length=4, max_env_steps=40, seed=0)
    measuring.quiet_trainer(clock).fit(IMPALA(), data)
    assert (clock.updates, clock.env_steps) == (3, 24)
    assert 0 < clock.means["time/sample_s"] * 3 < clock.seconds
    assert clock.cpu_seconds > 0


# --- scaling ----------------------------------------------------------------------------------------------------------


def test_the_ideal_is_a_step_that_only_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_scaling, "LENGTHS", {10: 8})
    cell = async_scaling.measure(sleep_ms=10, runners=2, seconds=0.1)
    # One process steps both of them here, one after the other: at most half of the ideal.
    assert 0 < cell["of_ideal"] <= 0.5
    assert cell["of_ideal"] == pytest.approx(cell["env_steps_per_s"] / 200, abs=2e-3)
    assert cell["policy_lag"] == 2 and 0.5 < cell["learner_idle"] <= 1
    assert async_scaling.table([cell]).splitlines()[2].startswith("| 10 | 2 | ")


def test_the_bytes_of_a_fragment_are_those_of_its_columns() -> None:
    fragment, weights = async_scaling.sizes(EnvConfig("CartPole-v1"), num_envs=8, length=64)
    row = 4 * 4 + 8 + 4 + 4 + 3  # observation, action, its log-probability, reward, terminated, truncated, is_init
    rest = 8 * 4 * 4 + 2 * 8 * 8 + 2 * 8 * 4 * 4 + 512  # last and final observations, final steps, alignment
    assert 8 * 64 * row < fragment < 8 * 64 * row + rest
    assert 4 * (4 * 64 + 64 * 64 + 64 * 2) < weights < 6 * (4 * 64 + 64 * 64 + 64 * 2)


# --- lag --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vtrace", [True, False])
def test_a_cell_learns_with_and_without_the_correction(vtrace: bool) -> None:
    cell = lag.run(2, vtrace, seed=1, budget=1600, episodes=2)
    assert cell.items() > {"lag": 2, "vtrace": vtrace, "seed": 1, "env_steps": 1600}.items()
    assert 8 <= cell["return_mean"] <= 500


def test_impala_alone_refuses_to_learn_without_the_correction() -> None:
    data = RolloutDataModule("CartPole-v1", num_env_runners=1, fixed_lag=1, max_env_steps=8000, seed=0)
    with pytest.raises(OptionError, match="vtrace=False: IMPALA then learns as if its own policy had acted"):
        measuring.quiet_trainer().fit(IMPALA(vtrace=False), data)


def cell(lag: int, vtrace: bool, seed: int, return_mean: float) -> dict[str, Any]:
    return {"lag": lag, "vtrace": vtrace, "seed": seed, "return_mean": return_mean}


def test_the_verdict_is_about_medians(tmp_path: Path) -> None:
    cells = [cell(k, True, s, r) for k in (0, 16) for s, r in enumerate((500.0, 460.0, 10.0))]
    cells += [cell(k, False, s, r) for k, rs in ((0, (470.0, 480.0, 490.0)), (16, (299.0, 500.0, 20.0))) for s, r in
              enumerate(rs)]  # fmt: skip
    assert lag.verdict(cells) == "a lag of 16 leaves 460 with V-trace, 299 without it"
    assert lag.table(cells).splitlines()[2:] == ["| 0 | 460.0 | 480.0 |", "| 16 | 460.0 | 299.0 |"]
    assert lag.verdict(cells[:6]).startswith("No lag leaves 450 and more with V-trace")
    lag.draw(cells, tmp_path / "lag.png")
    assert (tmp_path / "lag.png").stat().st_size > 5000


# --- speed ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "stream", "options", "rows_per_step"),
    [
        ("IMPALA", {}, {}, 1),
        ("APPO", {"num_reuses": 2}, {}, 2),
        ("PPO", {"prefetch": 1}, {"num_epochs": 3, "minibatch_size": 32}, 3),
    ],
)
def test_learned_rows_count_repeats(
    name: str, stream: dict[str, Any], options: dict[str, Any], rows_per_step: int
) -> None:
    found = async_speed.lit_rl(name, 0.1, length=8, stream=stream, **options)
    assert found["learned_rows_per_s"] == pytest.approx(found["env_steps_per_s"] * rows_per_step, rel=0.5)
    assert found["updates_per_s"] > 0 and 0 <= found["dropped"] < 0.5


def test_what_was_not_learned_from_is_dropped() -> None:
    found = async_speed.speeds(seconds=10.0, updates=20, learned=16_000, collected=10_000, uses=2)
    assert found == {"learned_rows_per_s": 1600.0, "env_steps_per_s": 1000.0, "updates_per_s": 2.0, "dropped": 0.2}


def test_the_time_to_a_return_begins_with_the_first_batch() -> None:
    found = async_speed.lit_rl_until("APPO", 25.0, seed=1)
    assert 0 < found["seconds"] < found["seconds_with_start"] < 60 and 800 < found["env_steps"] < 40_000


def test_systems_are_compared_within_each_round() -> None:
    runs = {"lit_rl": [{"env_steps_per_s": x} for x in (10.0, 30.0, 20.0)],
            "PPO": [{"env_steps_per_s": x} for x in (20.0, 20.0, 40.0)]}  # fmt: skip
    assert async_speed.table({"ppo": runs}).splitlines()[2:] == [
        "| ppo | lit_rl | 20 |  |",
        "| ppo | PPO | 20 | 0.50 |",
    ]


def test_rllib_reports_no_updates_of_every_second() -> None:
    assert async_speed.updates_of({"learners": {"default_policy": {"weights_seq_no": 7.0}}}) == 7
    assert async_speed.updates_of({"learners": {"default_policy": {"weights_seq_no": float("nan")}}}) == 0
    assert async_speed.updates_of({}) == 0


# --- faults -----------------------------------------------------------------------------------------------------------


def test_runners_are_killed_at_equal_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[int] = []
    monkeypatch.setattr(async_faults.os, "kill", lambda pid, number: killed.append(pid))
    found = async_faults.killed(times=3, env_steps=8000, episodes=2)
    assert killed == [os.getpid()] * 3 and found["killed"] == 3  # this process has all runners
    assert found["ledger_exact"] and found["env_steps"] == 8000
    assert not found["passed"]  # after so few env steps


def test_an_env_step_too_many_is_seen() -> None:
    data, algorithm = RolloutDataModule("CartPole-v1", max_env_steps=2048, seed=0), IMPALA()
    measuring.quiet_trainer().fit(algorithm, data)
    assert async_faults.is_exact(data, algorithm)
    data.ledger.delivered += 1
    assert not async_faults.is_exact(data, algorithm)


def test_memory_and_shares_are_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_faults, "STEP_S", 0.0)
    monkeypatch.setattr(async_faults, "SAMPLE_S", 0.01)
    found = async_faults.memory(minutes=0.03)
    assert found["ledger_exact"] and found["updates"] > 2 and len(found["samples"]) > 2
    assert found["least_share"] == pytest.approx(0.5, abs=0.2)
    assert 100 < found["first_mb"] <= found["last_mb"] + 50


def test_growth_is_counted_after_the_start() -> None:
    samples = [(minute / 10, 100.0 if minute < 20 else 300.0 + minute / 5) for minute in range(60)]
    assert async_faults.growth(samples, after=2.0) == 2.0


def test_one_process_is_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = str(tmp_path / "slow")
    env = async_faults.Dawdling(lock, owner=os.getpid())
    assert env._seconds == async_faults.STEP_S and not Path(lock).exists()
    assert async_faults.Dawdling(lock, owner=0)._seconds == 10 * async_faults.STEP_S
    monkeypatch.setattr(async_faults.os, "getpid", lambda: 1)
    assert async_faults.Dawdling(lock, owner=0)._seconds == async_faults.STEP_S


def test_the_documented_table_of_the_lag_is_that_of_the_written_cells() -> None:
    cells = json.loads((ROOT / "docs" / "results" / "lag_cartpole.json").read_text())["cells"]
    assert len(cells) == 2 * len(lag.LAGS) * len(lag.SEEDS)
    page = (ROOT / "docs" / "impala.md").read_text()
    assert all(line in page for line in lag.table(cells).splitlines()[1:])


def test_the_documented_shares_of_the_ideal_are_those_that_were_measured() -> None:
    found: dict[int, list[str]] = {}
    for cell in json.loads((ROOT / "docs" / "results" / "async_scaling.json").read_text())["cells"]:
        share = cell["env_steps_per_s"] / cell["runners"] * cell["sleep_ms"] / 10  # %
        found.setdefault(cell["sleep_ms"], []).append(f"{share:.0f}%")
    page = (ROOT / "docs" / "asynchronous.md").read_text()
    for sleep_ms, begin in ((100, "steps of 100 ms"), (10, "10 ms"), (1, "1 ms")):
        assert f"| {begin} | {' | '.join(found[sleep_ms])} |" in page
