"""Evaluation in Ray actors, while the learner waits or goes on."""

import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from lit_rl.envs.make import EnvConfig
from lit_rl.errors import EnvFailure
from lit_rl.evaluation.episodes import play
from lit_rl.policy import Policy
from lit_rl.runners.faults import FaultTolerance, Restarts
from lit_rl.runners.fragment import Episode
from lit_rl.runners.placement import Placement, cause_of, store_errors, store_is_full
from lit_rl.runners.transport import Packed, load_weights, pack_weights

log = logging.getLogger(__name__)


class EvalPool:
    """Ray actors that play the episodes of an evaluation, each its share of them.

    The share of an actor that dies, or whose environment raises, is played again.

    Args:
        env: how to make the environments.
        make_policy: makes a policy of the learner's structure inside an actor.
        num_runners: how many actors.
        faults: how often an evaluation is tried again; and how long after its time a step may last.
        placement: of the actors.
    """

    def __init__(
        self,
        env: EnvConfig,
        make_policy: Callable[[], Policy],
        num_runners: int,
        faults: FaultTolerance,
        placement: Placement,
    ):
        import ray

        self._ray = ray
        self._env = env
        self._make_policy = make_policy
        self._behind: set[int] = set()  # the actors that have another policy than `make_policy` makes
        self._faults = faults
        self._actor_class: Any = ray.remote(**placement.options())(_EvalActor)
        self._actors: list[Any] = [self._actor_class.remote(make_policy) for _ in range(num_runners)]
        self._under_way: dict[Any, tuple[int, list[int]]] = {}  # by Ray's reference: which actor, and what seeds it has

    def follow(self, make_policy: Callable[[], Policy]) -> None:
        """Have other policies play in the evaluations that are begun from now on."""
        self._make_policy = make_policy
        self._behind = set(range(len(self._actors)))

    def start(self, policy: Policy, seeds: Sequence[int], timeout_s: float, **options: Any) -> None:
        """Begin an evaluation of the policy as it is now.

        Args:
            policy: by whose weights.
            seeds: one for each episode.
            timeout_s: seconds from now.
            **options: of `play`.
        """
        try:
            self._weights = self._ray.put(pack_weights(policy))
        except store_errors(self._ray) as error:
            raise store_is_full("the policy's weights", error) from None
        self._options = options
        self._deadline = time.monotonic() + timeout_s
        self._restarts = Restarts(self._faults)
        num = len(self._actors)
        for runner, share in enumerate([list(seeds[i::num]) for i in range(num)]):
            self._begin(runner, share)

    def finish(self) -> list[Episode]:
        """The episodes of the last `start`; without those that could not be played."""
        episodes: list[Episode] = []
        exceptions = self._ray.exceptions
        while self._under_way:
            left = self._deadline + self._faults.step_timeout_s - time.monotonic()
            ready, stuck = self._ray.wait(list(self._under_way), timeout=max(left, 0.0))
            if not ready:
                self._give_up(stuck)
                break
            runner, seeds = self._under_way.pop(ready[0])
            try:
                episodes += self._ray.get(ready[0])
            except exceptions.RayTaskError as error:
                cause = cause_of(error)
                if not isinstance(cause, EnvFailure):
                    raise type(cause)(f"Eval runner {runner}: {cause}") from None
                self._again(runner, seeds, f"failed: {cause}")
            except exceptions.RayError as error:
                self._replace(runner)
                self._again(runner, seeds, f"died: {' '.join(str(error).split())[:200]}")
        return episodes

    def pids(self) -> list[int]:
        """The actors' process ids."""
        return self._ray.get([actor.pid.remote() for actor in self._actors])

    def close(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors, self._under_way = [], {}

    def _begin(self, runner: int, seeds: list[int]) -> None:
        if seeds:
            timeout_s = max(self._deadline - time.monotonic(), 0.0)
            update = self._make_policy if runner in self._behind else None
            self._behind.discard(runner)
            reference = self._actors[runner].play.remote(
                self._weights, self._env, seeds, timeout_s, self._options, update
            )
            self._under_way[reference] = runner, seeds

    def _again(self, runner: int, seeds: list[int], what: str) -> None:
        wait = self._restarts.failed()
        if wait is None or time.monotonic() >= self._deadline:  # there is no time to play them again
            log.warning("Eval runner %d %s. Its %d episodes are missing.", runner, what.rstrip("."), len(seeds))
            return
        log.warning("Eval runner %d %s. Its %d episodes are played again.", runner, what.rstrip("."), len(seeds))
        time.sleep(wait)
        self._begin(runner, seeds)

    def _give_up(self, references: list[Any]) -> None:
        """End actors whose time is over and who do not come back from a step."""
        for reference in references:
            runner, seeds = self._under_way.pop(reference)
            log.warning("Eval runner %d is stuck and was ended. Its %d episodes are missing.", runner, len(seeds))
            self._ray.kill(self._actors[runner])
            self._replace(runner)

    def _replace(self, runner: int) -> None:
        self._behind.discard(runner)
        self._actors[runner] = self._actor_class.remote(self._make_policy)


class _EvalActor:
    """Plays episodes in a process of its own."""

    def __init__(self, make_policy: Callable[[], Policy]):
        torch.set_num_threads(1)
        self._policy = make_policy().eval()

    def play(
        self,
        weights: Packed,
        env: EnvConfig,
        seeds: list[int],
        timeout_s: float,
        options: dict[str, Any],
        update: Callable[[], Policy] | None,
    ) -> list[Episode]:
        if update is not None:
            self._policy = update().eval()
        load_weights(self._policy, weights)
        self._policy.rng = np.random.default_rng(seeds)
        return list(play(env, self._policy, seeds, timeout_s=timeout_s, **options))

    def pid(self) -> int:
        return os.getpid()
