"""What a runner survives of its environments' failures."""

import time

from lit_rl.errors import EnvFailure, sentence
from lit_rl.runners.faults import BACKOFF_S, FaultTolerance, Phase, Restarts, Watchdog


class Survival:
    """Counts what environments raise against the budget, and remembers what there is to say of it.

    Args:
        faults: how many failures are survived.
        watchdog: what is told that the runner waits.

    Attributes:
        failures: what was survived, in sentences; its owner empties it.
    """

    def __init__(self, faults: FaultTolerance, watchdog: Watchdog):
        self.failures: list[str] = []
        self._faults, self._watchdog = faults, watchdog
        self._restarts = Restarts(faults)

    def went_well(self) -> None:
        """Something was done since the last failure: the next wait is a short one again."""
        self._restarts.went_well()

    def survive(self, error: Exception, who: str) -> None:
        """Count a failure, and wait before the next try; raises if the budget is spent.

        Args:
            error: what was raised.
            who: is rebuilt then, as the beginning of a sentence.
        """
        self._watchdog.enter(Phase.IDLE)
        wait = self._restarts.failed()
        if wait is None or not isinstance(error, EnvFailure):
            if not self._faults.max_restarts or not isinstance(error, EnvFailure):
                raise error
            raise EnvFailure(
                f"{sentence(error)} That was failure {self._restarts.total}, more than {self._restarts.budget} allows. "
                "Mend the environment, or raise fault_tolerance.max_restarts."
            ) from error
        self.failures.append(f"{sentence(error)} {who} rebuilt.")
        if wait > BACKOFF_S:  # the first in a row costs nobody anything
            time.sleep(wait)
