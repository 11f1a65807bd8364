"""Environments in processes of their own: nothing that goes wrong in one makes this process wait for ever."""

import contextlib
import copy
import multiprocessing.connection
import os
import queue
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import gymnasium as gym
from gymnasium.vector import AutoresetMode
from gymnasium.vector.async_vector_env import AsyncState

from lit_rl.envs.check import is_usual, reset_complaint, step_complaint
from lit_rl.envs.info import GathersInfo, asked_for
from lit_rl.errors import EnvError, EnvFailure, env_error

CLOSE_S = 30.0  # how long environments may take to close
BROKEN_CLOSE_S = 2.0  # the same, after one of them failed
ANSWER_S = 10.0  # how long the error of a process that reported one may take to arrive


class AsyncVectorEnv(GathersInfo, gym.vector.AsyncVectorEnv):
    """gymnasium's AsyncVectorEnv that never waits for a process that has ended, and kills one that does not end.

    What an environment raises arrives as an `EnvFailure`, and a result that is not one as an `EnvError`. After either,
    nothing is left to do but to close them all. Of `info` only `info_keys` leave the processes.
    """

    def __init__(
        self,
        env_fns: Sequence[Callable[[], gym.Env]],
        *,
        autoreset_mode: AutoresetMode,
        env_id: str = "environment",
        info_keys: Sequence[str] = (),
    ):
        self.env_id = env_id
        self.info_keys = tuple(info_keys)
        makers = [partial(_make, make, env_id, i, self.info_keys, os.getpid()) for i, make in enumerate(env_fns)]
        try:
            super().__init__(makers, autoreset_mode=autoreset_mode)
        except (EOFError, ConnectionError) as error:
            failure = self._ended("while it was made", error)
            self.close(terminate=True)
            raise failure from error

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> Any:
        try:
            return super().reset(seed=seed, options=options)
        except (EOFError, ConnectionError) as error:
            raise self._ended("in reset", error) from error

    def step(self, actions: Any) -> Any:
        try:
            return super().step(actions)
        except (EOFError, ConnectionError) as error:
            raise self._ended("in step", error) from error

    def close_extras(self, timeout: float | None = None, terminate: bool = False, **kwargs: Any) -> None:
        """Close the environments, and kill the processes of those that take too long; with `terminate` at once."""
        if timeout is None:
            timeout = BROKEN_CLOSE_S if _is_broken(self) else CLOSE_S
        _end_processes(self, 0.0 if terminate else timeout)

    def _ended(self, when: str, error: Exception) -> EnvFailure:
        """What there is to say of a process whose pipe has ended."""
        ended = multiprocessing.connection.wait([process.sentinel for process in self.processes], ANSWER_S)
        for i, process in enumerate(self.processes):
            if process.sentinel in ended:
                process.join(ANSWER_S)
                how = f"ended {when}, with exit code {process.exitcode}"
                return EnvFailure(f"env={self.env_id}: the process of environment {i} {how}.")
        return EnvFailure(f"env={self.env_id}: an environment's process was lost {when}: {type(error).__name__}.")

    def _add_info(self, vector_infos: dict[str, Any], env_info: dict[str, Any], env_num: int) -> dict[str, Any]:
        if "final_info" in env_info:  # an episode's end: gymnasium puts both beside the next one's info
            self._add_final(vector_infos, env_info["final_obs"], env_info["final_info"], env_num)
        return super()._add_info(vector_infos, env_info, env_num)

    def _raise_if_errors(self, successes: Sequence[bool]) -> None:
        if all(successes):
            return
        try:
            _, _, error, _ = self.error_queue.get(timeout=ANSWER_S)
        except queue.Empty:
            i = list(successes).index(False)
            error = EnvFailure(f"env={self.env_id}: environment {i} failed, and its process did not tell how.")
        raise error


class _Guard(gym.Wrapper):
    """Around an environment in its process: errors that can be sent, results that can be merged and are not reused."""

    def __init__(self, env: gym.Env, env_id: str, index: int, info_keys: Sequence[str]):
        super().__init__(env)
        self._env_id, self._index, self._info_keys = env_id, index, info_keys

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        result = self._call("reset", seed=seed, options=options)
        self._check("reset", reset_complaint(self.env.observation_space, result))
        obs, info = result
        return obs, asked_for(info, self._info_keys)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        result = self._call("step", action)
        if not is_usual(self.env.observation_space, result):
            self._check("step", step_complaint(self.env.observation_space, result))
        obs, reward, terminated, truncated, info = result
        if terminated or truncated:
            obs = copy.deepcopy(obs)  # the reset that follows may write into the same array
        return obs, reward, terminated, truncated, asked_for(info, self._info_keys)

    def _call(self, what: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return getattr(self.env, what)(*args, **kwargs)
        except Exception as error:  # also one that cannot be pickled: its sentence can
            raise env_error(self._env_id, f"raised in {what}", error) from error

    def _check(self, what: str, problem: str | None) -> None:
        if problem:
            raise EnvError(
                f"env={self._env_id}: {what} of environment {self._index} returned {problem}. Mend the environment."
            )


def close(envs: gym.vector.VectorEnv) -> None:
    """Close environments, also where one of gymnasium's own AsyncVectorEnv failed: its `close` would wait for it."""
    inner = envs.unwrapped
    if isinstance(inner, gym.vector.AsyncVectorEnv) and not inner.closed and _is_broken(inner):
        _end_processes(inner, BROKEN_CLOSE_S)
        inner.closed = True
    else:
        envs.close()


def _make(make: Callable[[], gym.Env], env_id: str, index: int, info_keys: Sequence[str], parent: int) -> gym.Env:
    if os.getpid() != parent:
        # A forked process inherits its parent's handler, and Lightning's only takes note of the signal.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return _Guard(make(), env_id, index, info_keys)


def _is_broken(envs: gym.vector.AsyncVectorEnv) -> bool:
    """Whether a call has not come to its end, or a process has."""
    return envs._state is not AsyncState.DEFAULT or not all(process.is_alive() for process in envs.processes)


def _end_processes(envs: gym.vector.AsyncVectorEnv, timeout_s: float) -> None:
    """Ask every process to close its environment; kill those that have not ended after `timeout_s` seconds together."""
    for pipe in envs.parent_pipes:
        if pipe is not None and not pipe.closed:
            with contextlib.suppress(OSError):  # its process has ended
                pipe.send(("close", None))
    deadline = time.monotonic() + timeout_s
    for process in envs.processes:
        process.join(max(deadline - time.monotonic(), 0.0))
    for process in envs.processes:
        if process.is_alive():
            process.kill()
            process.join(ANSWER_S)
    for pipe in envs.parent_pipes:
        if pipe is not None:
            pipe.close()
