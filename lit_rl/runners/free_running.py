"""Fragments of env runners that do not wait for the learner."""

import math
import time
from collections import Counter
from collections.abc import Callable

from lit_rl.runners.fragment import Fragment
from lit_rl.runners.ray_pool import RunnerPool


class FreeRunning:
    """Takes the fragments that are ready first, and leaves out those that are too old.

    A runner is asked for the next fragments before it is done with the last one, so that it need not wait for the
    learner. It collects them with the weights of the time it was asked.

    Args:
        num_waiting: fragments that may wait for the learner, beside the one that each runner is at.
        interval: versions between weights that are sent.
        max_lag: versions that a fragment may be behind when it is taken; None takes them all.

    Attributes:
        rows: env steps learned from each runner.
        idle_s: seconds that runners waited for the learner.
        busy_s: seconds that they collected.
        lag: of the fragment taken last that was behind most.
    """

    def __init__(self, num_waiting: int, interval: int, max_lag: int | None):
        self.rows: Counter[int] = Counter()
        self.idle_s = self.busy_s = 0.0
        self.lag = 0
        self._num_waiting, self._interval, self._max_lag = num_waiting, interval, max_lag

    def take(
        self,
        pool: RunnerPool,
        start: Callable[..., None],
        count: int,
        *,
        version: int,
        room: int,
        timeout_s: float = math.inf,
    ) -> tuple[list[tuple[int, Fragment]], list[tuple[int, Fragment]]]:
        """The next fragments, each after its runner: those to be learned from, and those that are too old.

        Args:
            pool: of the runners.
            start: asks them for fragments with the weights of now, as `RunnerPool.start` does.
            count: how many to learn from; fewer after `timeout_s`.
            version: of the weights now.
            room: how many fragments the budget has room for.
            timeout_s: how long to wait for them.
        """
        taken: list[tuple[int, Fragment]] = []
        dropped: list[tuple[int, Fragment]] = []
        until = time.monotonic() + timeout_s
        self.lag = 0
        while len(taken) < count and len(dropped) + count <= room:
            self._ask(pool, start, room - len(taken) - len(dropped))
            found = pool.finish_any(until - time.monotonic())
            if not found:
                break
            for runner, fragment in found:
                self.idle_s += fragment.idle_s
                self.busy_s += fragment.busy_s
                lag = version - fragment.policy_version
                if self._max_lag is not None and lag > self._max_lag:
                    dropped.append((runner, fragment))
                    continue
                taken.append((runner, fragment))
                self.lag = max(self.lag, lag)
                self.rows[runner] += fragment.entry.delivered
        self._ask(pool, start, room - len(taken) - len(dropped))
        return taken, dropped

    def _ask(self, pool: RunnerPool, start: Callable[..., None], room: int) -> None:
        num_runners = max(1, pool.num_runners)
        ahead = 1 + -(-self._num_waiting // num_runners)
        start(ahead=ahead, most=min(self._num_waiting + num_runners, room), interval=self._interval)
