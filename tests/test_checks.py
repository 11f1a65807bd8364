"""Option checks accept what they say and name the option, the value and what was expected."""

import math
from typing import Any

import pytest

from lit_rl.checks import check_choice, check_count, check_ending, check_range
from lit_rl.errors import LitRLError, OptionError


@pytest.mark.parametrize("value", [0, 0.0, 0.5, 1, 1.0])
def test_check_range_returns_values_inside_and_on_the_bounds(value: float) -> None:
    assert check_range("gamma", value, 0.0, 1.0) is value


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf, -math.inf, "0.5", None, True, False, [0.5]], ids=repr)
def test_check_range_refuses_everything_else(value: Any) -> None:
    with pytest.raises(OptionError) as error:
        check_range("gamma", value, 0.0, 1.0)
    assert str(error.value) == f"gamma={value!r}: expected a number, at least 0 and at most 1."


def test_check_range_with_exclusive_low_refuses_the_bound() -> None:
    assert check_range("lr", 1e-9, 0.0, exclusive_low=True) == 1e-9
    with pytest.raises(OptionError, match=r"lr=0\.0: expected a number, above 0\."):
        check_range("lr", 0.0, 0.0, exclusive_low=True)


def test_check_range_without_bounds_asks_for_a_finite_number() -> None:
    assert check_range("x", -1e300) == -1e300
    with pytest.raises(OptionError, match="x=inf: expected a number, finite"):
        check_range("x", math.inf)


@pytest.mark.parametrize(("value", "low"), [(1, 1), (7, 1), (0, 0)])
def test_check_count_returns_whole_numbers_from_low_on(value: int, low: int) -> None:
    assert check_count("num_epochs", value, low) is value


@pytest.mark.parametrize("value", [0, -1, 1.0, 1.5, "2", None, True], ids=repr)
def test_check_count_refuses_everything_else(value: Any) -> None:
    with pytest.raises(OptionError) as error:
        check_count("num_epochs", value)
    assert str(error.value) == f"num_epochs={value!r}: expected a whole number of at least 1."


def test_check_choice_names_the_choices() -> None:
    assert check_choice("activation", "tanh", ("tanh", "relu")) == "tanh"
    with pytest.raises(OptionError, match=r"activation='gelu': expected one of 'tanh', 'relu'\."):
        check_choice("activation", "gelu", ("tanh", "relu"))


def test_an_option_error_is_a_value_error_a_user_can_mend() -> None:
    assert issubclass(OptionError, LitRLError) and issubclass(OptionError, ValueError)


def test_check_ending_returns_it_in_lower_case_and_names_the_others() -> None:
    assert check_ending("video", "a/b.GIF", (".mp4", ".gif")) == ".gif"
    with pytest.raises(OptionError, match=r"output='a.bmp': expected a name that ends in .png, .svg or .pdf\."):
        check_ending("output", "a.bmp", (".png", ".svg", ".pdf"))
