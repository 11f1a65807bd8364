"""This rank's env runners as Ray actors, which are replaced when they die or stall."""

import logging
import math
import os
import socket
import tempfile
import time
from collections import deque
from collections.abc import Callable, Collection, Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lit_rl.errors import EnvError, EnvFailure, LitRLError, RunnerError
from lit_rl.policy import Policy
from lit_rl.runners.faults import BACKOFF_S, FaultTolerance, Heartbeat, Phase, Restarts, Watchdog
from lit_rl.runners.fragment import Epsilons, Fragment
from lit_rl.runners.ledger import Ledger
from lit_rl.runners.placement import Placement, cause_of, store_errors, store_is_full
from lit_rl.runners.pool import MakeRunner
from lit_rl.runners.transport import Packed, load_weights, pack_weights

log = logging.getLogger(__name__)

KILL_S = 2.0  # a killed process is gone by then


@dataclass
class _Slot:
    """A runner's place.

    Attributes:
        actor: its process; None while it waits to be replaced.
        incarnation: how many came before in this place.
        heartbeat: what its process writes, if that is on this machine.
        ready: Ray's reference to its being made; None once it is.
        fragments: those of the fragments it was asked for, in its order: it is at the first that is not ready.
        since: when `ready` or the first of `fragments` began.
        size: env steps of its last fragment.
        maker: number of what it acts by: that of the pool when it was made, or asked for its last fragment.
        restart_at: when it may be replaced.
        given_up: why it is not replaced any more.
    """

    restarts: Restarts
    actor: Any = None
    incarnation: int = 0
    heartbeat: Heartbeat | None = None
    ready: Any = None
    fragments: deque[Any] = field(default_factory=deque)
    since: float = 0.0
    size: int = 0
    maker: int = 0
    restart_at: float = field(default_factory=time.monotonic)
    given_up: str = ""

    @property
    def can_collect(self) -> bool:
        return self.actor is not None and self.ready is None


class RunnerPool:
    """Ray actors. One that dies, stalls or raises is replaced while the others' fragments are learned from.

    A replacement is made in the background; it collects from the `start` after the one in which it is ready, so with
    the newest weights. Only if no runner is left is it waited for.

    Args:
        make_runner: makes a runner inside its actor.
        num_env_runners: how many.
        ledger: where env steps are written down.
        faults: what is survived.
        placement: of the actors.

    Raises:
        EnvError: if an environment gives what it must not give; the runner's own error, unchanged.
        RunnerError: if fewer runners than `min_healthy` are left; with what ended the last one.
    """

    def __init__(
        self,
        make_runner: MakeRunner,
        num_env_runners: int,
        ledger: Ledger,
        faults: FaultTolerance = FaultTolerance(),  # noqa: B008 - it is frozen
        placement: Placement = Placement(),  # noqa: B008
    ):
        import ray
        from ray import cloudpickle

        self.ledger = ledger
        self._ray = ray
        self._actor_class = ray.remote(**placement.options())(_RunnerActor)
        self._maker: Any = make_runner
        self._make_runner = cloudpickle.dumps(make_runner)  # the actor reads it, and can say why it cannot
        self._num_makers = 0  # before this one
        self._faults = faults
        self._folder = tempfile.TemporaryDirectory(prefix="lit_rl-runners-")
        self._reference: Any = None  # Ray's, to the weights that were sent last
        self._sent_version = -math.inf  # of these; so they are too old for any runner
        self._slots: list[_Slot] = []
        self._incarnations: dict[int, int] = {}  # of runners that were taken away, should they come back
        self.resize(num_env_runners)
        self._wait(all_of=True)

    @property
    def num_runners(self) -> int:
        return sum(not slot.given_up for slot in self._slots)

    def resize(self, num_env_runners: int) -> None:
        """Add runners, which join when they are ready, or take away the last ones."""
        while len(self._slots) > num_env_runners:
            slot, runner = self._slots.pop(), len(self._slots)
            self._stop(runner, slot, "unread")
            self._incarnations[runner] = slot.incarnation + 1
        if self._slots and not self.num_runners:  # those that are left were given up: they get another chance
            for slot in self._slots:
                slot.given_up, slot.restarts, slot.restart_at = "", Restarts(self._faults), time.monotonic()
                slot.incarnation += 1
        while len(self._slots) < num_env_runners:
            incarnation = self._incarnations.get(len(self._slots), 0)
            self._slots.append(_Slot(Restarts(self._faults), incarnation=incarnation))
            self._restart_due()

    def start(
        self,
        policy: Policy,
        version: int,
        epsilons: Epsilons = (0.0,),
        *,
        ahead: int = 1,
        most: int | None = None,
        interval: int = 0,
    ) -> None:
        """See `Pool.start`. A runner may be asked for several fragments, which it collects one after the other.

        Args:
            policy, version, epsilons: see `Pool.start`; the fragments that are asked for now are collected with these.
            ahead: how many fragments each runner is to have been asked for that were not taken yet.
            most: how many all of them together; those that have the fewest are asked first.
            interval: versions between the weights that are sent: of newer ones the last that were sent are taken.
        """
        self._restart_due()
        self._welcome()
        asked = self._to_be_asked(ahead, most)
        if not asked and self._reference is not None and self.num_asked:
            return
        sent = self._reference is not None and version - self._sent_version < interval
        if not sent:  # one copy for all of them, and for those that join while no other is left
            try:
                self._reference = self._ray.put((pack_weights(policy), version, epsilons))
            except store_errors(self._ray) as error:
                raise store_is_full("the policy's weights", error) from None
            self._sent_version = version
        for slot in asked:
            self._ask(slot)

    def follow(self, make_policy: Callable[[], Policy], keep_states: bool | Collection[str]) -> None:
        """See `Pool.follow`. Each runner is told when it is asked for its next fragment."""
        from ray import cloudpickle

        self._maker = self._maker.with_policies(make_policy, keep_states)
        self._make_runner = cloudpickle.dumps(self._maker)
        self._num_makers += 1
        self._reference, self._sent_version = None, -math.inf

    def finish(self) -> list[tuple[int, Fragment]]:
        """The oldest fragment of every runner that was asked for one, each after its runner's number."""
        found: dict[int, Fragment] = {}
        while not found or self._under_way(found):
            found |= self._collect(max(1, len(self._under_way(found))), without=found)
        return sorted(found.items(), key=lambda pair: pair[0])

    def finish_any(self, timeout_s: float = math.inf) -> list[tuple[int, Fragment]]:
        """The fragment that is ready first, of those under way longest if there are several, after its runner.

        None if there is none within `timeout_s`.
        """
        found: dict[int, Fragment] = {}
        until = time.monotonic() + timeout_s
        while not found and (left := until - time.monotonic()) > 0:
            found = self._collect(1, timeout_s=left)
        return list(found.items())

    @property
    def num_asked(self) -> int:
        """Fragments that runners were asked for, and that were not taken."""
        return sum(len(slot.fragments) for slot in self._slots)

    @property
    def num_waiting(self) -> int:
        """Those of them that are ready."""
        asked = [fragment for slot in self._slots for fragment in slot.fragments]
        return len(self._ray.wait(asked, num_returns=len(asked), timeout=0)[0]) if asked else 0

    def get_state(self) -> list[dict[str, Any]]:
        """Nothing: a resumed run starts its runners' episodes and action noise afresh, with seeds of their own."""
        return []

    def pids(self) -> list[int]:
        """The process ids of the runners that are there."""
        actors = [slot.actor for slot in self._slots if slot.actor is not None and slot.ready is None]
        return self._ray.get([actor.pid.remote() for actor in actors])

    def close(self) -> None:
        self.resize(0)
        self._folder.cleanup()

    # --- fragments ----------------------------------------------------------------------------------------------

    def _to_be_asked(self, ahead: int, most: int | None) -> list[_Slot]:
        """The runners that are to be asked for a fragment, as often as they are."""
        ready = [slot for slot in self._slots if slot.can_collect]
        asked = [slot for level in range(ahead) for slot in ready if len(slot.fragments) <= level]
        return asked if most is None else asked[: max(0, most - self.num_asked)]

    def _ask(self, slot: _Slot) -> None:
        if not slot.fragments:
            slot.since = time.monotonic()
        update = self._make_runner if slot.maker < self._num_makers else None
        slot.fragments.append(slot.actor.sample.remote(self._reference, update))
        slot.maker = self._num_makers

    def _under_way(self, without: Container[int] = ()) -> dict[Any, int]:
        """References to the first fragment of each runner and their runners, the oldest first."""
        slots = [
            (slot.since, runner, slot)
            for runner, slot in enumerate(self._slots)
            if slot.fragments and runner not in without
        ]
        return {slot.fragments[0]: runner for _, runner, slot in sorted(slots, key=lambda entry: entry[:2])}

    def _collect(
        self, num_returns: int, *, without: Container[int] = (), timeout_s: float = math.inf
    ) -> dict[int, Fragment]:
        """The first fragments of runners that became ready, at most one of each, after the runners.

        Waits for `num_returns` of them, or until a runner's time is over, or `timeout_s`.
        """
        under_way = self._under_way(without)
        if not under_way:
            self._wait(all_of=False, timeout_s=timeout_s)
            return {}
        slots = self._slots
        left = min(slots[runner].since for runner in under_way.values()) + self._faults.sample_timeout_s
        timeout = min(max(left - time.monotonic(), 0.0), timeout_s)
        ready, _ = self._ray.wait(list(under_way), num_returns=num_returns, timeout=timeout)
        found = {}
        for reference in ready:
            runner = under_way[reference]
            fragment = self._take(runner)
            if fragment is not None:
                found[runner] = fragment
        now = time.monotonic()
        for reference, runner in self._under_way(without).items():
            late = now - slots[runner].since > self._faults.sample_timeout_s
            if late and not self._ray.wait([reference], timeout=0)[0]:  # it may have lain there for long
                limit = f"sample_timeout_s={self._faults.sample_timeout_s:g}"
                self._failed(runner, "stalled", f"gave no fragment within {limit}{self._doing(runner)}")
        return found

    def _take(self, runner: int) -> Fragment | None:
        """A runner's fragment that is ready; None if the runner failed."""
        slot, exceptions = self._slots[runner], self._ray.exceptions
        try:
            fragment: Fragment = self._ray.get(slot.fragments[0])
        except exceptions.RayTaskError as error:
            if isinstance(error.cause, store_errors(self._ray)):
                raise store_is_full(f"a fragment of env runner {runner}", error.cause) from None
            cause = cause_of(error)
            if not isinstance(cause, EnvFailure):
                raise type(cause)(f"Env runner {runner}: {cause}") from None
            slot.fragments.clear()
            self._give_up(runner, "env_error", f"failed: {str(cause).rstrip('.')}")
            return None
        except store_errors(self._ray) as error:
            raise store_is_full(f"a fragment of env runner {runner}", error) from None
        except exceptions.RayError as error:  # died, unreachable, or its fragment was lost with its node
            self._failed(runner, *self._why(runner, error))
            return None
        slot.fragments.popleft()
        slot.since, slot.size = time.monotonic(), fragment.entry.end - fragment.entry.start
        slot.restarts.went_well()
        self.ledger.deliver(runner, slot.incarnation, fragment.entry)
        self.ledger.restarts += len(fragment.failures)
        return fragment

    # --- life and death -----------------------------------------------------------------------------------------

    def _wait(self, all_of: bool, timeout_s: float = math.inf) -> None:
        """Wait until a runner, or all of them, is ready, and have it collect if there are weights to collect with."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            self._restart_due()
            references = [slot.ready for slot in self._slots if slot.ready is not None]
            if references:
                self._ray.wait(references, num_returns=len(references) if all_of else 1, timeout=BACKOFF_S)
                self._welcome()
            else:
                time.sleep(BACKOFF_S / 10)
            waiting = [slot for slot in self._slots if not slot.given_up and (slot.actor is None or slot.ready)]
            ready = [slot for slot in self._slots if slot.can_collect]
            if ready and (not all_of or not waiting):
                for slot in ready if self._reference is not None else ():
                    if not slot.fragments:
                        self._ask(slot)
                return

    def _welcome(self) -> None:
        """Let runners that are ready join; see to those that cannot be made."""
        exceptions = self._ray.exceptions
        for runner, slot in enumerate(self._slots):
            if slot.ready is None:
                continue
            done, _ = self._ray.wait([slot.ready], timeout=0)
            if not done:
                # A process takes its time to begin: the limit is counted once more for that.
                if time.monotonic() - slot.since > 2 * self._faults.init_timeout_s:
                    limit = f"init_timeout_s={self._faults.init_timeout_s:g}"
                    self._failed(runner, "stalled", f"was not made within twice {limit}{self._doing(runner)}")
                continue
            try:
                self._ray.get(slot.ready)
            except exceptions.RayTaskError as error:
                cause = cause_of(error)
                if not isinstance(cause, EnvFailure):
                    raise cause from None
                self._failed(runner, "env_error", f"cannot be made: {str(cause).rstrip('.')}")
            except exceptions.RayError as error:
                self._failed(runner, *self._why(runner, error))
            else:
                slot.ready = None
                self._sent_version = -math.inf  # it begins with the newest

    def _failed(self, runner: int, reason: str, what: str) -> None:
        """A runner is of no use any more: replace it later, or give it up."""
        slot = self._slots[runner]
        wait = slot.restarts.failed()
        if wait is None:
            self._give_up(runner, reason, what)
            return
        self._stop(runner, slot, reason)
        slot.incarnation += 1
        slot.restart_at = time.monotonic() + wait
        self.ledger.restarts += 1
        log.warning("Env runner %d %s. It is replaced (restart %d).", runner, what, slot.incarnation)
        self._restart_due()

    def _give_up(self, runner: int, reason: str, what: str) -> None:
        slot = self._slots[runner]
        self._stop(runner, slot, reason)
        slot.given_up = what
        left, wanted = self.num_runners, self._faults.min_healthy
        total = slot.restarts.total
        times = f" (failure {total}, {slot.restarts.budget})" if total else ""
        if left < min(wanted, len(self._slots)):
            raise RunnerError(
                f"Env runner {runner} is given up{times}: it {what}. Runners left: {left} of {len(self._slots)}, "
                f"min_healthy={wanted}. Run with num_env_runners=0 to see why."
            ) from None
        log.warning("Env runner %d is given up%s: it %s. Training goes on with %d.", runner, times, what, left)

    def _restart_due(self) -> None:
        now = time.monotonic()
        for runner, slot in enumerate(self._slots):
            if slot.actor is None and not slot.given_up and now >= slot.restart_at:
                path = Path(self._folder.name) / f"{runner}.{slot.incarnation}"
                slot.heartbeat = Heartbeat.create(path)
                address = f"{socket.gethostname()}:{path}"
                slot.actor = self._actor_class.remote(
                    self._make_runner, runner, slot.incarnation, self._faults, address
                )
                slot.ready, slot.since = slot.actor.ready.remote(), time.monotonic()
                slot.maker = self._num_makers

    def _stop(self, runner: int, slot: _Slot, reason: str) -> None:
        """End a runner's process; what it executed and did not deliver is written down."""
        if slot.actor is None:
            return
        self._ray.kill(slot.actor)
        if slot.fragments:
            self._ray.wait([slot.fragments[-1]], timeout=KILL_S)  # until then it may go on stepping
        incarnation, heartbeat = slot.incarnation, slot.heartbeat
        accounted = self.ledger.accounted(runner, incarnation)
        executed = 0 if heartbeat is None else heartbeat.executed
        if executed < accounted:  # on another machine, where nobody can ask any more
            executed, reason = accounted + slot.size * len(slot.fragments), "unknown"
        self.ledger.discard(runner, incarnation, executed, reason)
        (Path(self._folder.name) / f"{runner}.{incarnation}").unlink(missing_ok=True)
        slot.actor = slot.ready = slot.heartbeat = None
        slot.fragments.clear()

    def _why(self, runner: int, error: Exception) -> tuple[str, str]:
        """The reason for the ledger, and in words, why Ray lost a runner."""
        slot, faults = self._slots[runner], self._faults
        phase = self._phase(runner)
        limits = {
            Phase.INIT: faults.init_timeout_s,
            Phase.RESET: faults.reset_timeout_s,
            Phase.STEP: faults.step_timeout_s,
        }
        limit = limits.get(phase)
        if limit is not None and time.monotonic() - slot.since >= limit:
            return "stalled", f"took longer than {phase.name.lower()}_timeout_s={limit:g} and was ended"
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return "died", f"died{self._doing(runner)}: {reason.rstrip('.')}"

    def _doing(self, runner: int) -> str:
        phase = self._phase(runner)
        return "" if phase is Phase.IDLE else f" (in {phase.name.lower()})"

    def _phase(self, runner: int) -> Phase:
        heartbeat = self._slots[runner].heartbeat
        return Phase.IDLE if heartbeat is None else heartbeat.phase


class _RunnerActor:
    """An EnvRunner in a process of its own, that ends with the process that made it."""

    def __init__(self, make_runner: bytes, runner: int, incarnation: int, faults: FaultTolerance, beats: str):
        torch.set_num_threads(1)
        host, _, path = beats.partition(":")
        on_this_machine = host == socket.gethostname() and os.path.exists(path)
        watchdog = Watchdog(faults, Heartbeat(Path(path)) if on_this_machine else None)
        # An actor whose constructor raises is a dead actor to Ray: keep the error for the first call instead.
        self._error: Exception | None = None
        try:
            self._runner = _read(make_runner)(runner, incarnation, watchdog)
        except LitRLError as error:
            self._error = error
        self._ended: float | None = None  # when the last fragment was complete

    def ready(self) -> None:
        if self._error is not None:
            raise self._error

    def sample(self, acts_by: tuple[Packed, int, Epsilons], update: bytes | None = None) -> Fragment:
        begun = time.perf_counter()
        weights, version, epsilons = acts_by
        if update is not None:
            _read(update).update(self._runner)
        load_weights(self._runner.policy, weights)
        self._runner.set_version(version, epsilons)
        fragment = self._runner.sample()
        idle_s = 0.0 if self._ended is None else begun - self._ended
        self._ended = time.perf_counter()
        return fragment._replace(busy_s=self._ended - begun, idle_s=idle_s)

    def pid(self) -> int:
        return os.getpid()


def _read(make_runner: bytes) -> Any:
    """What this process was sent by the learner, as Ray itself sends an actor's arguments.

    Raises:
        EnvError: if the code of an environment, a wrapper or a policy cannot be imported here.
    """
    from ray import cloudpickle

    try:
        return cloudpickle.loads(make_runner)
    except (ImportError, AttributeError) as error:
        raise EnvError(
            f"An env runner's process cannot import what it was given ({type(error).__name__}: {error}): expected the "
            "code of env, wrappers and policy_class in modules that can be imported there. Put them beside the script, "
            "install them, or name their folder in PYTHONPATH."
        ) from error
