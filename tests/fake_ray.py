"""Ray's actors in this process, by a clock of their own: runners of different speeds, without waiting for them."""

import itertools
import signal
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import ray.exceptions

from lit_rl.datamodules.environments import EnvDataModule


class _Reference:
    """What a task returns, or an object that was put."""

    def __init__(self, task: Callable[[], Any] | None = None, *, begins: float = 0.0, takes: float = 0.0):
        self.begins, self.takes = begins, takes
        self._task, self._value = task, None

    @property
    def done_at(self) -> float:
        return self.begins + self.takes

    def run(self) -> Any:
        if self._task is not None:
            self._value, self._task = self._task(), None
        return self._value


class _Method:
    def __init__(self, actor: "_Actor", name: str):
        self._actor, self._name = actor, name

    def remote(self, *arguments: Any) -> _Reference:
        return self._actor.call(self._name, arguments)


class _Actor:
    def __init__(self, fake: "FakeRay", number: int, instance: Any):
        self.fake, self.number, self.instance = fake, number, instance
        self.alive, self.free_at = True, fake.now

    def __getattr__(self, name: str) -> _Method:
        return _Method(self, name)

    def call(self, name: str, arguments: tuple[Any, ...]) -> _Reference:
        takes = self.fake.seconds[self.number % len(self.fake.seconds)] if name == "sample" else 0.0
        reference = _Reference(lambda: self.run(name, arguments), begins=max(self.fake.now, self.free_at), takes=takes)
        self.free_at = reference.done_at
        return reference

    def run(self, name: str, arguments: tuple[Any, ...]) -> Any:
        if not self.alive:
            raise ray.exceptions.RayActorError()
        return getattr(self.instance, name)(*(x.run() if isinstance(x, _Reference) else x for x in arguments))


class FakeRay:
    """What `RunnerPool` uses of the module `ray`.

    Args:
        seconds: that each runner takes for a fragment, again from the first where there are more runners.

    Attributes:
        now: its clock, which goes on when a fragment is waited for, and when a test says so.
    """

    exceptions = ray.exceptions
    cloudpickle = SimpleNamespace(dumps=lambda x: x, loads=lambda x: x)  # there is one process

    def __init__(self, seconds: Sequence[float]):
        self.seconds, self.now = seconds, 0.0
        self._numbers = itertools.count()

    def remote(self, **_: Any) -> Callable[[type], Any]:
        def decorate(cls: type) -> Any:
            fake = self

            class Handle:
                @staticmethod
                def remote(*arguments: Any) -> _Actor:
                    return _Actor(fake, next(fake._numbers), cls(*arguments))

            return Handle

        return decorate

    def put(self, value: Any) -> _Reference:
        return _Reference(lambda: value)

    def get(self, reference: Any) -> Any:
        return [each.run() for each in reference] if isinstance(reference, list) else reference.run()

    def wait(
        self, references: list[_Reference], *, num_returns: int = 1, timeout: float | None = None
    ) -> tuple[list[_Reference], list[_Reference]]:
        last = sorted(each.done_at for each in references)[num_returns - 1]
        self.now = max(self.now, last if timeout is None else min(last, self.now + timeout))
        ready = [each for each in references if each.done_at <= self.now][:num_returns]
        return ready, [each for each in references if each not in ready]

    def kill(self, actor: _Actor) -> None:
        actor.alive = False


def use(monkeypatch: pytest.MonkeyPatch, *seconds: float) -> FakeRay:
    """Have datamodules make their runners in this process, by a clock of their own."""
    fake = FakeRay(seconds)
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setattr(EnvDataModule, "_connect_ray", lambda self: None)
    monkeypatch.setattr(signal, "setitimer", lambda *_: (0.0, 0.0))  # the runners' watchdogs would end this process
    return fake
