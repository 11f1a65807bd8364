"""This rank's env runners: in this process, or as Ray actors that are replaced when they die."""

import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch

from lit_rl.errors import EnvError, LitRLError, RunnerError
from lit_rl.policy import Policy
from lit_rl.runners.env_runner import EnvRunner, Fragment
from lit_rl.runners.transport import Packed, load_weights, pack_weights

log = logging.getLogger(__name__)

# (runner, incarnation) -> a new EnvRunner. An incarnation has a seed of its own.
MakeRunner = Callable[[int, int], EnvRunner]
MAX_RESTARTS = 5  # of one runner, with no fragment in between


class Pool(Protocol):
    """What a datamodule needs of its env runners. The learner can work between `start` and `finish`."""

    num_restarts: int

    def start(self, policy: Policy, version: int, epsilon: float = 0.0) -> None:
        """Have every runner that has nothing to do collect one fragment.

        Args:
            policy: by whose weights, as they are now.
            version: of these weights.
            epsilon: probability of random actions instead.
        """

    def finish(self) -> list[Fragment]:
        """The fragments of the last `start`, in the order of the runners."""

    def get_state(self) -> list[dict[str, Any]]:
        """The runners' states as plain data."""

    def close(self) -> None:
        """Stop the runners."""


class LocalPool:
    """One env runner in this process; nothing of Ray is imported."""

    num_restarts = 0

    def __init__(self, make_runner: MakeRunner):
        self._runner = make_runner(0, 0)
        self._weights: Any = None  # the learner's policy, the runner's tensors and the learner's

    def start(self, policy: Policy, version: int, epsilon: float = 0.0) -> None:
        if self._weights is None or self._weights[0] is not policy:
            tensors = ([*module.parameters(), *module.buffers()] for module in (self._runner.policy, policy))
            self._weights = policy, *tensors
        with torch.no_grad():
            torch._foreach_copy_(*self._weights[1:])
        self._runner.set_version(version, epsilon)

    def finish(self) -> list[Fragment]:
        return [self._runner.sample()]

    def get_state(self) -> list[dict[str, Any]]:
        return [self._runner.get_state()]

    def set_state(self, states: list[dict[str, Any]]) -> None:
        """Go on from what `get_state` returned."""
        self._runner.set_state(states[0])

    def close(self) -> None:
        self._runner.close()


class RunnerPool:
    """`num_env_runners` Ray actors. One that dies is replaced, and its fragment collected again.

    Args:
        make_runner: makes a runner inside its actor.
        num_env_runners: how many.

    Raises:
        EnvError: if an environment cannot be made or raises; the runner's own error, unchanged.
        RunnerError: if a runner dies `MAX_RESTARTS` times without a fragment in between.
    """

    def __init__(self, make_runner: MakeRunner, num_env_runners: int):
        import ray

        self._ray = ray
        # A task that ran is never run again in secret (max_task_retries=0): this pool decides.
        self._actor_class = ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0)(_RunnerActor)
        self._make_runner = make_runner
        self._incarnations = [0] * num_env_runners
        self._failures = [0] * num_env_runners
        self._pending: dict[int, Any] = {}  # fragments under way by runner, in the order they were begun
        self.num_restarts = 0
        self._actors = [self._new_actor(runner) for runner in range(num_env_runners)]

    def start(self, policy: Policy, version: int, epsilon: float = 0.0) -> None:
        idle = [runner for runner in range(len(self._actors)) if runner not in self._pending]
        if idle:  # one copy for all of them, and for those that replace them
            self._reference = self._ray.put((pack_weights(policy), version, epsilon))
        for runner in idle:
            self._pending[runner] = self._actors[runner].sample.remote(self._reference)

    def finish(self) -> list[Fragment]:
        return [self._finish_one(runner) for runner in range(len(self._actors))]

    def finish_any(self) -> tuple[int, Fragment]:
        """The fragment that is ready first, of those under way longest if there are several, and its runner."""
        references = list(self._pending.values())
        ready = self._ray.wait(references, num_returns=1)[0][0]
        runner = next(runner for runner, reference in self._pending.items() if reference == ready)
        return runner, self._finish_one(runner)

    def get_state(self) -> list[dict[str, Any]]:
        """Nothing: a resumed run starts its runners' episodes and action noise afresh, with seeds of their own."""
        return []

    def pids(self) -> list[int]:
        """The runners' process ids."""
        return self._ray.get([actor.pid.remote() for actor in self._actors])

    def close(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors, self._pending = [], {}

    def _finish_one(self, runner: int) -> Fragment:
        exceptions = self._ray.exceptions
        while True:
            try:
                fragment = self._ray.get(self._pending[runner])
            except exceptions.RayTaskError as error:
                raise _cause(error) from None
            except exceptions.RayError as error:  # died, unreachable, or its fragment was lost with its node
                self._replace(runner, error)
            else:
                self._failures[runner] = 0
                del self._pending[runner]
                return fragment

    def _replace(self, runner: int, error: Exception) -> None:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        self._failures[runner] += 1
        if self._failures[runner] > MAX_RESTARTS:
            raise RunnerError(
                f"Env runner {runner} died {self._failures[runner]} times in a row without collecting a fragment: "
                f"{reason} Run with num_env_runners=0 to see why."
            ) from None
        self._incarnations[runner] += 1
        self.num_restarts += 1
        log.warning("Env runner %d died and is replaced (restart %d): %s", runner, self._incarnations[runner], reason)
        self._ray.kill(self._actors[runner])
        self._actors[runner] = self._new_actor(runner)
        self._pending[runner] = self._actors[runner].sample.remote(self._reference)

    def _new_actor(self, runner: int) -> Any:
        return self._actor_class.remote(self._make_runner, runner, self._incarnations[runner])


class _RunnerActor:
    """An EnvRunner in a process of its own, that ends with the process that made it."""

    def __init__(self, make_runner: MakeRunner, runner: int, incarnation: int):
        import torch

        torch.set_num_threads(1)
        # An actor whose constructor raises is a dead actor to Ray: keep the error for the first call instead.
        self._error: Exception | None = None
        try:
            self._runner = make_runner(runner, incarnation)
        except LitRLError as error:
            self._error = error

    def sample(self, acts_by: tuple[Packed, int, float]) -> Fragment:
        if self._error is not None:
            raise self._error
        weights, version, epsilon = acts_by
        load_weights(self._runner.policy, weights)
        self._runner.set_version(version, epsilon)
        return self._runner.sample()

    def pid(self) -> int:
        import os

        return os.getpid()


def _cause(error: Any) -> Exception:
    cause = getattr(error, "cause", None)
    if isinstance(cause, LitRLError):
        return cause
    message = " ".join(str(cause or error).split())
    return EnvError(f"An env runner raised {type(cause or error).__name__}: {message}")
