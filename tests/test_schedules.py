"""Schedules by env steps."""

from typing import Any

import pytest

from lit_rl.errors import OptionError
from lit_rl.schedules import check_schedule, scheduled

POINTS = [[100, 1.0], [200, 0.5], [400, 0.7]]


@pytest.mark.parametrize(
    ("schedule", "env_steps", "value"),
    [
        ("constant", 0, 2.0),
        ("constant", 10**9, 2.0),
        ("linear", 0, 2.0),
        ("linear", 250, 1.5),  # 2 (1 - 250/1000)
        ("linear", 1000, 0.0),
        ("linear", 1500, 0.0),  # never negative
        (POINTS, 0, 1.0),  # constant before the first point
        (POINTS, 100, 1.0),
        (POINTS, 150, 0.75),
        (POINTS, 200, 0.5),
        (POINTS, 300, 0.6),
        (POINTS, 400, 0.7),
        (POINTS, 10**9, 0.7),  # and after the last
        ([[50, 3.0]], 0, 3.0),
        ([[50, 3.0]], 99, 3.0),
    ],
)
def test_scheduled_equals_the_table_worked_by_hand(schedule: Any, env_steps: int, value: float) -> None:
    found = scheduled("lr_schedule", 2.0, check_schedule("lr_schedule", schedule), env_steps, 1000)
    assert found == pytest.approx(value)


def test_linear_schedule_without_a_budget_says_what_to_set() -> None:
    with pytest.raises(OptionError, match=r"lr_schedule='linear'.*max_env_steps"):
        scheduled("lr_schedule", 1.0, "linear", 0, None)


def test_tuples_are_points_as_lists_are() -> None:
    assert check_schedule("lr_schedule", ((0, 1.0), (10, 0.0))) == [[0, 1.0], [10, 0.0]]


@pytest.mark.parametrize(
    "schedule",
    ["cosine", [], [[0]], [[0, 1.0, 2.0]], [[0, -1.0]], [[0, "1"]], [[10, 1.0], [0, 0.5]], [[0, 1.0], [0, 0.5]]],
    ids=repr,
)
def test_check_schedule_refuses_what_is_none_and_names_the_option(schedule: Any) -> None:
    with pytest.raises(OptionError, match="lr_schedule="):
        check_schedule("lr_schedule", schedule)
