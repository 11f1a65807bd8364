"""Numbers that change with the clock: env steps, or updates where there is no environment."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from lit_rl.errors import OptionError
from lit_rl.options import Limit, NonNegative, UnitInterval, check

WORDS = ("constant", "linear", "cosine")


class ScheduleOf(Limit):
    """A word, or points `[[env_step, value], ...]` of values that an annotation allows."""

    def __init__(self, value: Any):
        self.value = value

    def __call__(self, name: str, value: Any) -> Any:
        if isinstance(super().__call__(name, value), str):
            return value
        points = [[check(name, step, NonNegative), check(name, number, self.value)] for step, number in value]
        if any(later[0] <= earlier[0] for earlier, later in pairwise(points)):
            raise OptionError(f"{name}={value!r}: expected env steps in rising order.")
        return points

    def accepts(self, value: Any) -> bool:
        if isinstance(value, str):
            return value in WORDS
        is_list = isinstance(value, list | tuple) and len(value) > 0
        return is_list and all(isinstance(point, list | tuple) and len(point) == 2 for point in value)

    def __repr__(self) -> str:
        return f"{', '.join(map(repr, WORDS))} or [[env_step, value], ...]"


Schedule = Annotated[str | Sequence[Sequence[float]], ScheduleOf(NonNegative)]
UnitSchedule = Annotated[str | Sequence[Sequence[float]], ScheduleOf(UnitInterval)]


class Scheduled(nn.Module):
    """The option `name` that changes as the option `<name>_schedule` says.

    A module, so that its value moves to the device with the algorithm it is part of.

    Args:
        name: the option's.
        start: the value of "constant", and at env step 0 of "linear" and "cosine".
        schedule: "constant"; "linear" or "cosine" (half a wave), to 0 at the end of the budget; or points
            `[[env_step, value], ...]`, linear between them and constant outside them, which replace `start`.

    Attributes:
        value: the value now, a tensor [] of its own: a compiled step that reads it need not be compiled anew.

    >>> lr = Scheduled("lr", 1.0, [[0, 1.0], [100, 0.5]])
    >>> lr.at(50, None)
    0.75
    >>> lr.follow(100, None)
    >>> lr.value
    tensor(0.5000)
    """

    value: Tensor

    def __init__(self, name: str, start: float, schedule: Any = "constant"):
        super().__init__()
        self._name, self._start, self._schedule = name, start, schedule
        first = start if isinstance(schedule, str) else schedule[0][1]
        self.register_buffer("value", torch.tensor(float(first)), persistent=False)

    def at(self, env_steps: int, budget: int | None) -> float:
        """The value after `env_steps` of a budget.

        Raises:
            OptionError: if there is no budget for it to end at.
        """
        start, schedule = self._start, self._schedule
        if schedule == "constant":
            return start
        if isinstance(schedule, str):
            if budget is None:
                raise OptionError(
                    f"{self._name}_schedule={schedule!r}: expected a budget to end at: set max_env_steps, or "
                    "max_updates of recorded data, on the datamodule."
                )
            left = max(0.0, 1.0 - env_steps / budget)
            return start * (left if schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)
        points = list(schedule)
        if env_steps <= points[0][0]:
            return float(points[0][1])
        for (step, value), (next_step, next_value) in pairwise(points):
            if env_steps < next_step:
                return float(value + (next_value - value) * (env_steps - step) / (next_step - step))
        return float(points[-1][1])

    def follow(self, env_steps: int, budget: int | None) -> None:
        """Set `value` to that after `env_steps`."""
        self.value.fill_(self.at(env_steps, budget))
