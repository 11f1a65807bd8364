"""This rank's env runners: what a datamodule asks of them, and the one that needs no Ray."""

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any, Protocol

import torch
from torch import nn

from lit_rl.errors import EnvError
from lit_rl.policy import Policy
from lit_rl.runners.faults import Watchdog
from lit_rl.runners.fragment import Epsilons, Fragment
from lit_rl.runners.ledger import Ledger


class Runner(Protocol):
    """What a pool needs of a runner, be its environments of one agent or of several: see `EnvRunner`."""

    policy: Any

    @property
    def executed(self) -> int: ...

    def set_version(self, version: int, epsilons: Epsilons = (0.0,)) -> None: ...

    def sample(self) -> Fragment: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> int: ...

    def close(self) -> None: ...


# (runner, incarnation, watchdog) -> a new runner. An incarnation has a seed of its own.
MakeRunner = Callable[[int, int, Watchdog], Runner]


class Pool(Protocol):
    """What a datamodule needs of its env runners. The learner can work between `start` and `finish`.

    Attributes:
        ledger: where the env steps went.
        num_runners: those that are not given up.
    """

    ledger: Ledger

    @property
    def num_runners(self) -> int: ...

    def start(self, policy: Policy, version: int, epsilons: Epsilons = (0.0,)) -> None:
        """Have every runner that has nothing to do collect one fragment.

        Args:
            policy: by whose weights, as they are now.
            version: of these weights.
            epsilons: see `EnvRunner.set_version`.
        """

    def finish(self) -> list[tuple[int, Fragment]]:
        """The fragments of the last `start`, each after its runner's number: at least one."""

    def follow(self, make_policy: Callable[[], Policy], keep_states: bool | Collection[str]) -> None:
        """Have runners act by other policies from the next `start` on. Fragments under way are of those before.

        Args:
            make_policy: makes them.
            keep_states: see `EnvRunner`.
        """

    def get_state(self) -> list[dict[str, Any]]:
        """The runners' states as plain data."""

    def close(self) -> None:
        """Stop the runners."""


class LocalPool:
    """One env runner in this process; nothing of Ray is imported."""

    num_runners = 1

    def __init__(self, make_runner: MakeRunner, ledger: Ledger):
        self.ledger = ledger
        self._make_runner: Any = make_runner
        self._runner = make_runner(0, 0, Watchdog())
        self._weights: Any = None  # the learner's policy, the runner's tensors and the learner's

    def start(self, policy: Policy, version: int, epsilons: Epsilons = (0.0,)) -> None:
        if self._weights is None or self._weights[0] is not policy:
            self._weights = policy, *(_tensors(module) for module in (self._runner.policy, policy))
        with torch.no_grad():
            torch._foreach_copy_(*self._weights[1:])
        self._runner.set_version(version, epsilons)

    def follow(self, make_policy: Callable[[], Policy], keep_states: bool | Collection[str]) -> None:
        self._make_runner = self._make_runner.with_policies(make_policy, keep_states)
        self._weights = None
        with _named():
            self._make_runner.update(self._runner)

    def finish(self) -> list[tuple[int, Fragment]]:
        with _named():
            fragment = self._runner.sample()
        self.ledger.deliver(0, 0, fragment.entry)
        self.ledger.restarts += len(fragment.failures)
        return [(0, fragment)]

    def get_state(self) -> list[dict[str, Any]]:
        return [self._runner.get_state()]

    def set_state(self, states: list[dict[str, Any]]) -> int:
        """Go on from what `get_state` returned; returns how many episodes could not."""
        return self._runner.set_state(states[0])

    def close(self) -> None:
        self.ledger.discard(0, 0, self._runner.executed, "unread")
        self._runner.close()


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    """A module's parameters and buffers, as often as they have a name: the learner's policies may share some."""
    found = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return [tensor for _, tensor in found]


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """Name the runner in what it raises, as actors' errors do."""
    try:
        yield
    except EnvError as error:
        raise type(error)(f"Env runner 0: {error}") from error
