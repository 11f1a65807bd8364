"""Where every env step went: delivered to the learner once, or discarded with a reason."""

from collections import Counter
from typing import NamedTuple

from lit_rl.errors import RunnerError


class Entry(NamedTuple):
    """A fragment's line in the ledger.

    Attributes:
        start: env steps that the runner's incarnation had executed before.
        end: and after.
        delivered: real transitions among them.
        discarded: the rest, by reason.
        agent_steps: with several agents, transitions of all of them in the fragment; env steps are calls of `step`.
        abandoned: episodes that were broken off before it, since a policy that acted in them was removed.
    """

    start: int
    end: int
    delivered: int
    discarded: dict[str, int]
    agent_steps: int = 0
    abandoned: int = 0


class Ledger:
    """Counts the env steps of all runners of a learner process.

    Attributes:
        delivered: transitions that the learner was given.
        discarded: env steps that it was not given, by reason: "env_error" (the step raised), "died" and "stalled" (the
            runner, before its fragment was complete), "unread" (the run ended, or the runner was taken away, before the
            fragment was read), "unknown" (as "died" on a node that is gone: at most so many).
        restarts: runners that were replaced, and environments that were rebuilt.
        dropped: of the delivered transitions, those that were too old to learn from.
        agent_steps: with several agents, transitions of all of them that were delivered.
        abandoned: episodes that were broken off, since a policy that acted in them was removed. All their env steps
            were delivered; what their agents did last is in no transition.
    """

    def __init__(self) -> None:
        self.delivered = 0
        self.discarded: Counter[str] = Counter()
        self.restarts = 0
        self.dropped = 0
        self.agent_steps = 0
        self.abandoned = 0
        self._accounted: dict[tuple[int, int], int] = {}  # of each incarnation: its env steps that are accounted for

    @property
    def executed(self) -> int:
        return self.delivered + sum(self.discarded.values())

    def deliver(self, runner: int, incarnation: int, entry: Entry) -> None:
        """A fragment arrived.

        Raises:
            RunnerError: if env steps are missing before it, or some were delivered before: a bug.
        """
        accounted = self._accounted.get((runner, incarnation), 0)
        size = entry.delivered + sum(entry.discarded.values())
        if entry.start != accounted or entry.end - entry.start != size:
            raise RunnerError(
                f"Env runner {runner}.{incarnation}: a fragment has env steps {entry.start} to {entry.end}, of which "
                f"{size} are accounted for, after step {accounted}. This is a bug in lit_rl: please report it."
            )
        self._accounted[runner, incarnation] = entry.end
        self.delivered += entry.delivered
        self.agent_steps += entry.agent_steps
        self.abandoned += entry.abandoned
        self.discarded.update(entry.discarded)

    def discard(self, runner: int, incarnation: int, executed: int, reason: str) -> int:
        """An incarnation is gone: of its `executed` env steps, those not accounted for are lost; returns how many."""
        lost = executed - self._accounted.pop((runner, incarnation), 0)
        if lost:
            self.discarded[reason] += lost
        return lost

    def accounted(self, runner: int, incarnation: int) -> int:
        """Env steps of an incarnation that are accounted for."""
        return self._accounted.get((runner, incarnation), 0)

    def state(self) -> dict[str, dict[str, int] | int]:
        """As plain data; the incarnations do not live on."""
        return {
            "delivered": self.delivered,
            "discarded": dict(self.discarded),
            "restarts": self.restarts,
            "dropped": self.dropped,
            "agent_steps": self.agent_steps,
            "abandoned": self.abandoned,
        }

    def load(self, state: dict) -> None:
        """Go on from what `state` returned."""
        self.delivered, self.restarts = state["delivered"], state["restarts"]
        self.dropped = state.get("dropped", 0)  # absent from older checkpoints
        self.agent_steps = state.get("agent_steps", 0)  # likewise
        self.abandoned = state.get("abandoned", 0)  # likewise
        self.discarded = Counter(state["discarded"])

    def add(self, state: dict) -> None:
        """Count what another ledger, of which this is the `state`, counted."""
        self.delivered += state["delivered"]
        self.restarts += state["restarts"]
        self.dropped += state.get("dropped", 0)
        self.agent_steps += state.get("agent_steps", 0)
        self.abandoned += state.get("abandoned", 0)
        self.discarded.update(state["discarded"])
