"""Environments in processes of their own that die, hang or return nonsense: nothing waits for them for ever."""

import faulthandler
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from envs import CounterEnv, FailingEnv
from gymnasium.vector import AutoresetMode

from lit_rl.envs import async_vector
from lit_rl.envs.async_vector import AsyncVectorEnv, close
from lit_rl.envs.make import EnvConfig
from lit_rl.errors import EnvError, EnvFailure
from lit_rl.evaluation.episodes import play
from lit_rl.policy import Policy
from lit_rl.rollout import next_observation
from lit_rl.runners.env_runner import EnvRunner
from lit_rl.runners.gathering import to_rollout

ACTIONS = np.zeros(2, np.int64)


class Broken(CounterEnv):
    """Goes wrong at its `at`-th step (of its life), or when it is closed."""

    def __init__(self, how: str, at: int = 1):
        super().__init__()
        self._how, self._left = how, at

    def step(self, action: Any) -> Any:
        self._left -= 1
        obs, reward, terminated, truncated, info = super().step(action)
        if self._left:
            return obs, reward, terminated, truncated, info
        if self._how == "dies":
            os._exit(3)
        if self._how == "sleeps":
            time.sleep(1000)
        if self._how == "cannot be pickled":
            raise type("Local", (Exception,), {})("the simulator fell over")
        if self._how == "takes two arguments":
            raise UnicodeDecodeError("utf-8", b"x", 0, 1, "the simulator fell over")
        return obs, reward, terminated, truncated, None if self._how == "no info" else info

    def close(self) -> None:
        if self._how == "does not close":
            time.sleep(1000)


class BadReset(CounterEnv):
    """Returns an observation alone from its second reset on."""

    def reset(self, **options: Any) -> Any:
        found = super().reset(**options)
        return found[0] if self._episode else found


@pytest.fixture(autouse=True)
def no_hanging() -> Iterator[None]:
    """A test that waits for ever is a failure, not a test run without an end. No process is left behind."""
    faulthandler.dump_traceback_later(300, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def broken(how: str, **options: Any) -> AsyncVectorEnv:
    # The second alone goes wrong.
    return AsyncVectorEnv(
        [CounterEnv, lambda: Broken(how, **options)], autoreset_mode=AutoresetMode.SAME_STEP, env_id="Broken"
    )


def are_gone(envs: gym.vector.AsyncVectorEnv) -> bool:
    return not any(process.is_alive() for process in envs.processes)


def test_a_process_that_dies_is_named_and_the_others_are_closed() -> None:
    envs = broken("dies")
    envs.reset(seed=0)
    with pytest.raises(EnvFailure, match="env=Broken: the process of environment 1 ended in step, with exit code 3"):
        envs.step(ACTIONS)
    envs.close()
    assert are_gone(envs)


@pytest.mark.slow
def test_processes_that_begin_anew_do_the_same() -> None:
    """As all do once torchrl has been imported."""
    multiprocessing.set_start_method("spawn", force=True)
    try:
        test_a_process_that_dies_is_named_and_the_others_are_closed()
    finally:
        multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)


def test_a_process_that_dies_between_two_calls_is_named() -> None:
    envs = broken("never")
    os.kill(envs.processes[1].pid, signal.SIGKILL)
    envs.processes[1].join()
    with pytest.raises(EnvFailure, match="environment 1 ended in reset, with exit code -9"):
        envs.reset(seed=0)
    envs.close()
    assert are_gone(envs)


def test_a_process_that_dies_while_its_environment_is_made_is_named() -> None:
    parent = os.getpid()

    def make() -> gym.Env:
        if os.getpid() != parent:
            os._exit(4)
        return CounterEnv()

    with pytest.raises(EnvFailure, match="the process of environment 0 ended while it was made, with exit code 4"):
        AsyncVectorEnv([make, make], autoreset_mode=AutoresetMode.SAME_STEP, env_id="Broken")


@pytest.mark.parametrize("how", ["sleeps", "does not close"])
def test_a_process_that_does_not_end_is_killed(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_vector, "CLOSE_S", 0.5)
    monkeypatch.setattr(async_vector, "BROKEN_CLOSE_S", 0.5)
    # A handler that takes note of the signal alone, as Lightning's: processes that are forked inherit it.
    previous = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        envs = broken(how)
    finally:
        signal.signal(signal.SIGTERM, previous)
    envs.reset(seed=0)
    if how == "sleeps":
        envs.step_async(ACTIONS)
    envs.close()
    assert are_gone(envs)


def test_a_process_ends_by_sigterm_although_its_parent_does_not() -> None:
    previous = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        envs = broken("never")
    finally:
        signal.signal(signal.SIGTERM, previous)
    envs.reset(seed=0)  # both are made now
    for process in envs.processes:
        process.terminate()
        process.join()
        assert process.exitcode == -signal.SIGTERM
    envs.close()


@pytest.mark.parametrize("how", ["cannot be pickled", "takes two arguments"])
def test_whatever_an_environment_raises_arrives(how: str) -> None:
    envs = broken(how)
    envs.reset(seed=0)
    with pytest.raises(EnvFailure, match=r"env=Broken raised in step: (Local|UnicodeDecodeError): .*fell over"):
        envs.step(ACTIONS)
    envs.close()
    assert are_gone(envs)


def test_results_that_cannot_be_merged_are_named() -> None:
    envs = broken("no info")
    envs.reset(seed=0)
    with pytest.raises(EnvError, match=r"step of environment 1 returned .*expected .observation, reward, terminated"):
        envs.step(ACTIONS)
    envs.close()
    envs = AsyncVectorEnv([BadReset] * 2, autoreset_mode=AutoresetMode.SAME_STEP, env_id="Bad")
    envs.reset(seed=0)
    with pytest.raises(EnvError, match=r"env=Bad: reset of environment [01] returned .*expected .observation, info"):
        envs.reset(seed=0)
    envs.close()
    assert are_gone(envs)


@pytest.mark.parametrize("how", ["dies", "cannot be pickled"])
def test_a_runner_rebuilds_its_environments(how: str) -> None:
    env = EnvConfig(Broken, {"how": how, "at": 9}, vectorization="async")
    policy = Policy(env.spec())
    runner = EnvRunner(env, policy, num_envs=2, rollout_length=6, seed=np.random.SeedSequence(0))
    fragments = [runner.sample() for _ in range(3)]
    assert [len(fragment.failures) for fragment in fragments] == [0, 1, 1]
    assert "All 2 environments are rebuilt" in fragments[1].failures[0]
    runner.close()


def native(num_envs: int) -> gym.vector.VectorEnv:
    # The one that is tried out is well.
    how = "dies" if num_envs > 1 else "never"
    return gym.vector.AsyncVectorEnv([lambda: Broken(how, 9)] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)


def test_a_runner_closes_gymnasiums_own_environments_that_died() -> None:
    env = EnvConfig(native, vectorization="native")
    runner = EnvRunner(env, Policy(env.spec()), num_envs=2, rollout_length=6, seed=np.random.SeedSequence(0))
    runner.sample()
    assert "raised in step: EOFError" in runner.sample().failures[0]
    runner.close()
    envs = native(2)
    envs.reset(seed=0)
    envs.step_async(ACTIONS)
    close(envs)
    assert are_gone(envs) and envs.closed


def test_environments_that_are_well_are_closed_by_their_own_close(tmp_path: Any) -> None:
    class Notes(CounterEnv):
        def close(self) -> None:
            (tmp_path / str(os.getpid())).touch()

    envs = AsyncVectorEnv([Notes] * 2, autoreset_mode=AutoresetMode.SAME_STEP)
    envs.reset(seed=0)
    pids = {str(process.pid) for process in envs.processes}
    envs.close()
    assert pids <= {path.name for path in tmp_path.iterdir()}


def test_evaluation_that_fails_comes_to_an_end() -> None:
    env = EnvConfig(FailingEnv, {"at": 2}, vectorization="async")
    with pytest.raises(EnvFailure, match="the simulator fell over"):
        list(play(env, Policy(env.spec()), [1, 2]))


class Reuses(gym.ObservationWrapper):
    """Writes every observation into the same arrays, and all that is in `info` into the same dict and array."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        number = env.observation_space
        self.observation_space = gym.spaces.Dict(n=number, pair=gym.spaces.Tuple([number, number]))
        array = np.zeros(1, np.float32)
        self._obs, self._info = {"n": array, "pair": (array, array)}, {"t": np.zeros(())}

    def reset(self, **options: Any) -> Any:
        obs, _ = super().reset(**options)
        return obs, self._info

    def step(self, action: Any) -> Any:
        *found, _ = super().step(action)
        return *found, self._info

    def observation(self, observation: np.ndarray) -> Any:
        self._obs["n"][:] = observation
        self._info["t"][()] = observation[0] % 100
        return self._obs


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_final_observations_are_true_where_an_environment_reuses_its_arrays(vectorization: str) -> None:
    env = EnvConfig(CounterEnv, wrappers=[Reuses], vectorization=vectorization)
    runner = EnvRunner(
        env, Policy(env.spec()), num_envs=2, rollout_length=9, seed=np.random.SeedSequence(0), info_metrics=["t"]
    )
    fragment = runner.sample()
    runner.close()
    rollout = to_rollout([fragment], copy=True)
    for part in (next_observation(rollout)["n"], next_observation(rollout)["pair"]["1"]):
        assert torch.equal(part, rollout["observation"]["n"] + 1)  # also at an episode's end
    assert [episode.info["t"] for episode in fragment.episodes] == [e.length for e in fragment.episodes]


def reusing_native(num_envs: int) -> gym.vector.VectorEnv:
    makers = [CounterEnv] * num_envs
    return gym.vector.SyncVectorEnv(makers, copy=False, autoreset_mode=AutoresetMode.NEXT_STEP)


def test_recorded_observations_are_true_where_a_native_environment_reuses_its_arrays() -> None:
    env = EnvConfig(reusing_native, vectorization="native")
    episodes = list(play(env, Policy(env.spec()), [1, 2, 3], num_envs=1, record=True))
    assert [(e.steps["observation"][:, 0] % 100).tolist() for e in episodes] == [[0, 1], [0, 1, 2], [0, 1, 2, 3]]
