"""Values that change with the number of env steps."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from lit_rl.checks import check_range
from lit_rl.errors import OptionError

Schedule = str | Sequence[Sequence[float]]


def scheduled(name: str, start: float, schedule: Schedule, env_steps: int, max_env_steps: int | None) -> float:
    """The value after `env_steps`.

    Args:
        name: the option's, for messages.
        start: the value of "constant", and at env step 0 of "linear".
        schedule: "constant"; "linear", to 0 at `max_env_steps`; or points `[[env_step, value], ...]`, linear between
            them and constant outside them.
        env_steps: how many were taken.
        max_env_steps: the budget.

    Raises:
        OptionError: if "linear" has no budget to end at.

    >>> scheduled("lr_schedule", 1.0, [[0, 1.0], [100, 0.5]], env_steps=50, max_env_steps=None)
    0.75
    """
    if schedule == "constant":
        return start
    if schedule == "linear":
        if max_env_steps is None:
            raise OptionError(f"{name}='linear': expected a budget to end at: set max_env_steps on the datamodule.")
        return start * max(0.0, 1.0 - env_steps / max_env_steps)
    assert not isinstance(schedule, str), "an unknown schedule: see check_schedule"
    points = list(schedule)
    if env_steps <= points[0][0]:
        return float(points[0][1])
    for (step, value), (next_step, next_value) in pairwise(points):
        if env_steps < next_step:
            return float(value + (next_value - value) * (env_steps - step) / (next_step - step))
    return float(points[-1][1])


def check_schedule(name: str, schedule: Schedule) -> Schedule:
    """Return `schedule` if it is one.

    Raises:
        OptionError: naming the option and its value.
    """
    if isinstance(schedule, str):
        if schedule in ("constant", "linear"):
            return schedule
        raise OptionError(f"{name}={schedule!r}: expected 'constant', 'linear' or [[env_step, value], ...].")
    is_list = isinstance(schedule, list | tuple)
    if not is_list or not schedule or any(not isinstance(p, list | tuple) or len(p) != 2 for p in schedule):
        raise OptionError(f"{name}={schedule!r}: expected 'constant', 'linear' or [[env_step, value], ...].")
    points = [list(point) for point in schedule]
    for step, value in points:
        check_range(name, step, 0.0)
        check_range(name, value, 0.0)
    if any(later[0] <= earlier[0] for earlier, later in pairwise(points)):
        raise OptionError(f"{name}={schedule!r}: expected env steps in rising order.")
    return points


def check_points(name: str, value: "float | Sequence[Sequence[float]]", high: float = math.inf) -> Any:
    """Return a number, or points `[[env_step, number], ...]`, if all numbers are in [0, high].

    Raises:
        OptionError: naming the option and its value.
    """
    if isinstance(value, list | tuple):
        check_schedule(name, value)
        return [[step, check_range(name, point, 0.0, high)] for step, point in value]
    return check_range(name, value, 0.0, high)


def value_at(name: str, value: "float | Sequence[Sequence[float]]", env_steps: int) -> float:
    """A constant, or the value of points `[[env_step, value], ...]` after `env_steps`.

    >>> value_at("epsilon", [[0, 1.0], [100, 0.0]], 25)
    0.75
    """
    return float(value) if isinstance(value, int | float) else scheduled(name, 0.0, value, env_steps, None)
