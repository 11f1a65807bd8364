"""Env runners as Ray actors: the same transitions, replaced when they die, stall or raise."""

import json
import os
import signal
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from envs import CounterEnv, FailingEnv
from helpers import CommandServer
from test_env_runner import CONFIGS, FRAGMENTS, LENGTH, NUM_ENVS, check_episodes, check_rollouts

from lit_rl.envs.make import EnvConfig
from lit_rl.errors import EnvError, RunnerError
from lit_rl.policy import Policy
from lit_rl.runners import ray_session as session
from lit_rl.runners.env_runner import EnvRunner
from lit_rl.runners.faults import FaultTolerance, Watchdog
from lit_rl.runners.fragment import Fragment
from lit_rl.runners.gathering import to_rollout
from lit_rl.runners.ledger import Ledger
from lit_rl.runners.placement import Placement
from lit_rl.runners.ray_pool import RunnerPool

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_session")]


def make_pool(*configs: EnvConfig, ledger: Ledger | None = None, **faults: Any) -> tuple[RunnerPool, Policy]:
    """A runner for each config, all with one policy."""
    policy = Policy(configs[0].spec())
    tolerance = FaultTolerance(**faults)

    def make_runner(runner: int, incarnation: int, watchdog: Watchdog) -> EnvRunner:
        return EnvRunner(
            configs[runner % len(configs)],
            Policy(policy.spec),
            num_envs=NUM_ENVS,
            rollout_length=LENGTH,
            seed=np.random.SeedSequence(0, spawn_key=(runner, incarnation)),
            faults=tolerance,
            watchdog=watchdog,
        )

    return RunnerPool(make_runner, len(configs), ledger or Ledger(), tolerance), policy


def collect(pool: RunnerPool, policy: Policy, version: int = 0) -> list[tuple[int, Fragment]]:
    pool.start(policy, version)
    return pool.finish()


def wait_for_fragments(pool: RunnerPool) -> None:
    """Until every runner's fragment lies there."""
    fragments = [slot.fragments[0] for slot in pool._slots]
    assert len(ray.wait(fragments, num_returns=len(fragments), timeout=60)[0]) == len(fragments)


def test_every_transition_is_exact_through_ray_in_every_autoreset_mode() -> None:
    ledger = Ledger()
    pool, policy = make_pool(*CONFIGS.values(), ledger=ledger)
    collected: list[list[Fragment]] = []
    for version in range(FRAGMENTS):
        collected.append([fragment for _, fragment in collect(pool, policy, version)])
    pool.close()
    real = 0
    for config, fragments in zip(CONFIGS.values(), zip(*collected)):
        offsets = list(range(NUM_ENVS)) if config.vectorization == "native" else [0] * NUM_ENVS
        rollouts = [to_rollout([fragment], copy=True) for fragment in fragments]
        check_rollouts(rollouts, offsets)
        check_episodes(list(fragments), offsets)
        real += sum(rollout.env_steps for rollout in rollouts)
        assert [fragment.policy_version for fragment in fragments] == list(range(FRAGMENTS))
        rollouts[0]["observation"].add_(1.0)  # Ray's own memory is read-only, the rollout's is not
    assert (ledger.delivered, ledger.executed) == (real, real)  # reset rows are no env steps


def test_a_killed_runner_is_replaced_while_the_other_goes_on() -> None:
    ledger = Ledger()
    pool, policy = make_pool(EnvConfig("CartPole-v1"), EnvConfig("CartPole-v1"), ledger=ledger)
    first = collect(pool, policy)
    os.kill(pool.pids()[0], signal.SIGKILL)
    alone, version = 0, 1
    while True:
        policy.head.weight.data.mul_(1.5)
        fragments = collect(pool, policy, version)
        rollout = to_rollout([fragment for _, fragment in fragments], copy=True)
        # Whoever collected, did so with the newest weights.
        assert all(fragment.policy_version == version for _, fragment in fragments)
        log_prob, _ = policy.evaluate(rollout)
        np.testing.assert_allclose(log_prob.detach(), rollout["action_log_prob"], atol=1e-5)
        if len(fragments) == 2:
            break
        assert [runner for runner, _ in fragments] == [1]  # nobody waited for the other
        alone, version = alone + 1, version + 1
        policy.head.weight.data.clamp_(-1, 1)
        time.sleep(0.2)
    assert alone and pool.ledger.restarts == 1
    # A new incarnation has seeds of its own: it does not replay its predecessor's first episodes.
    a, b = (fragments[0][1].rows.views()["observation"][:, 0] for fragments in (first, fragments))
    assert not np.array_equal(a, b)
    assert ledger.executed == ledger.delivered + ledger.discarded["died"]
    pool.close()


def test_code_that_an_actor_cannot_import_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("only_in_this_process")
    module.Env = type("Env", (), {"__module__": module.__name__})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    given = module.Env()

    def make_runner(runner: int, incarnation: int, watchdog: Watchdog) -> EnvRunner:
        raise AssertionError(given)

    ledger = Ledger()
    with pytest.raises(EnvError, match=r"cannot import what it was given .*No module named 'only_in_this_process'"):
        RunnerPool(make_runner, 1, ledger)
    assert ledger.restarts == 0


def test_what_a_dead_runner_had_executed_is_known() -> None:
    ledger = Ledger()
    pool, policy = make_pool(EnvConfig("envs:DyingEnv"), ledger=ledger, max_restarts=1)
    pool.start(policy, 0)
    with pytest.raises(RunnerError, match=r"Env runner 0 is given up \(failure 2, max_restarts=1 in 600 s\)") as caught:
        pool.finish()
    assert "died (in step)" in str(caught.value) and "\n" not in str(caught.value)
    assert dict(ledger.discarded) == {"died": 2 * NUM_ENVS}  # each executed one whole step
    pool.close()


def test_an_environment_that_always_raises_ends_the_run_with_its_own_error_soon() -> None:
    pool, policy = make_pool(EnvConfig(FailingEnv, {"at": 2}), max_restarts=5)
    pool.start(policy, 0)
    with pytest.raises(RunnerError, match="FailingEnv raised in step: ValueError: the simulator fell over") as caught:
        pool.finish()
    assert "failure 6, more than max_restarts=5 in 600 s allows" in str(caught.value)
    pool.close()


def test_training_goes_on_without_a_runner_that_is_given_up() -> None:
    pool, policy = make_pool(EnvConfig(CounterEnv), EnvConfig(FailingEnv, {"at": 2}), max_restarts=0)
    assert [runner for runner, _ in collect(pool, policy)] == [0]
    assert [runner for runner, _ in collect(pool, policy)] == [0] and pool.num_runners == 1
    pool.close()
    pool, policy = make_pool(EnvConfig(CounterEnv), EnvConfig(FailingEnv, {"at": 2}), max_restarts=0, min_healthy=2)
    with pytest.raises(RunnerError, match="Runners left: 1 of 2, min_healthy=2"):
        collect(pool, policy)
    pool.close()


@pytest.mark.parametrize(("where", "restarts"), [("step", 0), ("reset", 0), ("spin", 1)])
def test_a_stalled_runner_is_ended_and_replaced(where: str, restarts: int) -> None:
    ledger = Ledger()
    pool, policy = make_pool(
        EnvConfig(CounterEnv),
        EnvConfig("envs:StallingEnv", {"where": where}),
        ledger=ledger,
        step_timeout_s=2.0,
        reset_timeout_s=2.0,
        max_restarts=restarts,
    )
    longest = 0.0
    while pool.num_runners == 2:  # the stalling one stalls again after it was replaced
        started = time.monotonic()
        fragments = collect(pool, policy)
        longest = max(longest, time.monotonic() - started)
        assert [runner for runner, _ in fragments] == [0]
        time.sleep(0.3)  # leaves the processor to the one that starts
    assert 1.5 < longest < 40 and pool.ledger.restarts == restarts
    assert ledger.discarded["stalled"] >= (restarts + 1) * NUM_ENVS
    pool.close()


def test_a_runner_that_hangs_otherwise_is_ended_by_the_limit_of_a_fragment() -> None:
    ledger = Ledger()
    pool, policy = make_pool(EnvConfig(CounterEnv), EnvConfig(CounterEnv), ledger=ledger, sample_timeout_s=2.0)
    os.kill(pool.pids()[1], signal.SIGSTOP)
    started = time.monotonic()
    assert [runner for runner, _ in collect(pool, policy)] == [0]
    assert 1.5 < time.monotonic() - started < 40 and pool.ledger.restarts == 1
    pool.close()


def test_runners_are_added_and_taken_away() -> None:
    ledger = Ledger()
    pool, policy = make_pool(EnvConfig(CounterEnv), ledger=ledger)
    pool.resize(2)
    while len(found := collect(pool, policy)) < 2:
        time.sleep(0.2)
    assert [runner for runner, _ in found] == [0, 1]
    pool.start(policy, 1)
    wait_for_fragments(pool)
    pool.resize(1)
    assert [runner for runner, _ in pool.finish()] == [0]
    assert ledger.discarded["unread"] == NUM_ENVS * LENGTH  # nobody took the other's fragment
    pool.resize(2)
    while len(again := collect(pool, policy)) < 2:
        time.sleep(0.2)
    # One that is added in the place of another has seeds of its own.
    first, second = (fragments[1][1].rows.views()["action"] for fragments in (found, again))
    assert not np.array_equal(first, second)
    pool.close()


def test_fragments_that_lay_there_for_long_are_no_stalled_runners(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, policy = make_pool(EnvConfig(CounterEnv), EnvConfig(CounterEnv), sample_timeout_s=300.0)
    pool.start(policy, 0)
    wait_for_fragments(pool)
    now = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: now() + 301.0)  # as if the learner had evaluated
    assert sorted(pool.finish_any()[0][0] for _ in range(2)) == [0, 1]
    assert pool.ledger.restarts == 0
    pool.close()


def test_a_resource_that_ray_must_have_is_asked_for() -> None:
    def make_runner(runner: int, incarnation: int, watchdog: Watchdog) -> EnvRunner:
        raise AssertionError("no node has it")

    faults, placement = FaultTolerance(init_timeout_s=1.0, max_restarts=0), Placement(resources={"simulator": 1})
    with pytest.raises(RunnerError, match="was not made within twice init_timeout_s=1"):
        RunnerPool(make_runner, 1, Ledger(), faults, placement)


def test_every_process_that_ray_starts_can_be_told_by_its_environment() -> None:
    """Ray's agents write a title over their own, and would be left after a `kill -9` of the learner."""
    (raylet,) = (p for p in psutil.Process().children() if "/raylet" in p.cmdline()[0])
    for _ in range(300):
        children = {" ".join(p.cmdline()).strip("\0 "): p for p in raylet.children()}
        if {"ray::DashboardAgent", "ray::RuntimeEnvAgent"} <= children.keys():
            break
        time.sleep(0.1)
    assert {"ray::DashboardAgent", "ray::RuntimeEnvAgent"} <= children.keys()
    for title, process in children.items():
        assert any(name == session.OWNER for name in process.environ()), title


SMALL_STORE = """
import json, logging, sys
import ray
from lightning import Trainer
from lit_rl import MLP, PPO, RolloutDataModule
from lit_rl.errors import LitRLError
from envs import WideEnv

def small(space):
    return MLP(space, hidden_sizes=[2])

disk, length = sys.argv[1], int(sys.argv[2])
ray.init(
    "local", num_cpus=2, object_store_memory=80 * 2**20, include_dashboard=False, logging_level=logging.ERROR,
    _system_config={"local_fs_capacity_threshold": 0.0} if disk == "full" else None,
)
algorithm = PPO(minibatch_size=8, num_epochs=1, network=small)
data = RolloutDataModule(
    WideEnv, num_env_runners=2, num_envs_per_env_runner=1, rollout_length=length, max_env_steps=2 * 2 * length
)
error = None
try:
    Trainer(
        accelerator="cpu", max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        limit_val_batches=0,
    ).fit(algorithm, data)
except LitRLError as caught:
    error = str(caught)
ledger = data.ledger
print("FOUND", json.dumps([error, algorithm.env_steps_done, ledger.delivered, dict(ledger.discarded), ledger.restarts]))
"""


@pytest.mark.parametrize(("disk", "length"), [("free", 48), ("full", 90)])
def test_a_full_object_store_moves_to_the_disk_and_without_one_ends_the_run_with_one_sentence(
    disk: str, length: int, tmp_path: Path, command_server: CommandServer
) -> None:
    """FT5: the store holds 80 MB, a fragment takes one for each of its rows."""
    (tmp_path / "small_store.py").write_text(SMALL_STORE)
    printed = command_server.run_script(tmp_path, tmp_path / "small_store.py", disk, length)
    (found,) = [line.removeprefix("FOUND ") for line in printed.splitlines() if line.startswith("FOUND ")]
    error, env_steps, delivered, discarded, restarts = json.loads(found)
    assert restarts == 0
    if disk == "free":
        assert (error, env_steps, delivered, discarded) == (None, 4 * length, 4 * length, {})
    else:
        assert error.startswith("Ray's object store has no room for a fragment of env runner") and "\n" not in error
        assert "Free disk space" in error and "OutOfDiskError" in error
        assert (env_steps, delivered, discarded) == (0, 0, {"unread": 2 * length})  # all are accounted for
