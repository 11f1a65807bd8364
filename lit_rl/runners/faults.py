"""What is survived, how often, and how long anything may take."""

import contextlib
import mmap
import signal
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import FrameType

from lit_rl.options import Count, CountOrZero, OptionFields, Positive, check_fields

BACKOFF_S, LONGEST_BACKOFF_S = 0.5, 30.0  # before the first restart, and at most


@dataclass(frozen=True)
class FaultTolerance(OptionFields):
    """How env runners' failures are survived: dead and stalled processes, environments that raise.

    Attributes:
        max_restarts: failures of one runner, its environments included, within `restart_window_s`; 0 ends training at
            the first. A runner that fails more often is given up.
        restart_window_s: seconds over which failures are counted.
        min_healthy: training goes on while so many runners of a learner process are not given up.
        init_timeout_s: seconds for making a runner's environments.
        reset_timeout_s: seconds for one reset.
        step_timeout_s: seconds for one step of all environments of a runner.
        sample_timeout_s: seconds for one fragment, whatever takes the time.

    The four limits hold for runners in processes of their own (`num_env_runners` of at least 1): a process that takes
    longer is killed, even in compiled code, and replaced. What stalls the learner's own process cannot be survived.
    """

    max_restarts: CountOrZero = 5
    restart_window_s: Positive = 600.0
    min_healthy: Count = 1
    init_timeout_s: Positive = 120.0
    reset_timeout_s: Positive = 60.0
    step_timeout_s: Positive = 30.0
    sample_timeout_s: Positive = 300.0

    def __post_init__(self) -> None:
        check_fields(self, "fault_tolerance.")


class Restarts:
    """Counts one runner's failures against its budget.

    Attributes:
        total: failures so far.
    """

    def __init__(self, faults: FaultTolerance):
        self._faults = faults
        self._times: deque[float] = deque()
        self._in_a_row = 0
        self.total = 0

    def failed(self) -> float | None:
        """Count a failure: seconds to wait before the restart, or None if the budget is spent.

        The wait doubles from `BACKOFF_S` with every failure in a row.
        """
        now = time.monotonic()
        self.total += 1
        self._times.append(now)
        while now - self._times[0] > self._faults.restart_window_s:
            self._times.popleft()
        self._in_a_row += 1
        if len(self._times) > self._faults.max_restarts:
            return None
        return min(BACKOFF_S * 2.0 ** (self._in_a_row - 1), LONGEST_BACKOFF_S)

    def went_well(self) -> None:
        """Something was done since: the next wait is a short one again."""
        self._in_a_row = 0

    @property
    def budget(self) -> str:
        """In words."""
        return f"max_restarts={self._faults.max_restarts} in {self._faults.restart_window_s:g} s"


class Phase(IntEnum):
    """What a runner is doing."""

    IDLE = 0
    INIT = 1
    RESET = 2
    STEP = 3


@contextlib.contextmanager
def time_limit(seconds: float, error: Exception) -> Iterator[None]:
    """Raise `error` in the main thread where the block takes longer, unless compiled code holds it."""

    def expire(number: int, frame: FrameType | None) -> None:
        raise error

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous, started = signal.signal(signal.SIGALRM, expire), time.monotonic()
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)  # of an alarm somebody else has set
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, previous)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - started), 1e-3))


NUMBERS = struct.Struct("qq")


class Heartbeat:
    """Two numbers that a runner's process writes and that outlive it: env steps executed, and what it was doing.

    Args:
        path: of a file, that of `create` or of the process that reads.
    """

    def __init__(self, path: Path):
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), NUMBERS.size)

    @classmethod
    def create(cls, path: Path) -> "Heartbeat":
        path.write_bytes(bytes(NUMBERS.size))
        return cls(path)

    @property
    def executed(self) -> int:
        return NUMBERS.unpack_from(self._memory)[0]

    @property
    def phase(self) -> Phase:
        return Phase(NUMBERS.unpack_from(self._memory)[1])

    def write(self, executed: int, phase: Phase) -> None:
        NUMBERS.pack_into(self._memory, 0, executed, phase)


class Watchdog:
    """Ends this process when a phase takes too long, whatever holds the interpreter: the kernel's alarm does it.

    The alarm comes when the limit is over, or up to `SLACK` of it later: so an alarm serves many short steps, and is
    set about twice a second instead of at each of them. One that was given no limits does nothing, as in the learner's
    own process.

    Attributes:
        executed: env steps so far, which its owner counts.
        is_on: whether there are limits.
    """

    SLACK = 0.02

    def __init__(self, faults: FaultTolerance | None = None, heartbeat: Heartbeat | None = None):
        self.executed = 0
        self.is_on = faults is not None
        self._heartbeat = heartbeat
        self._limits = self._latest = (0.0,) * len(Phase)
        self._alarm_at = 0.0
        if faults is not None:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process
            self._limits = (0.0, faults.init_timeout_s, faults.reset_timeout_s, faults.step_timeout_s)
            self._latest = tuple(limit * (1 + self.SLACK) for limit in self._limits)

    def enter(self, phase: Phase) -> None:
        """A phase begins."""
        if not self.is_on:
            return
        if self._heartbeat is not None:
            self._heartbeat.write(self.executed, phase)
        begun, latest = time.monotonic(), self._latest[phase]
        if not begun + self._limits[phase] <= self._alarm_at <= begun + latest:
            self._alarm_at = begun + latest
            signal.setitimer(signal.ITIMER_REAL, latest)  # 0: none

    def enter_reset(self, begins: bool) -> None:
        """A reset within a step begins, or is over."""
        self.enter(Phase.RESET if begins else Phase.STEP)
