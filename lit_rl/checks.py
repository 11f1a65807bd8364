"""Checks of option values: one sentence that names the option, the value and what was expected."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from lit_rl.errors import OptionError


def check_range(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    exclusive_low: bool = False,
) -> float:
    """Return `value` if it is a finite number in [low, high], or (low, high] with `exclusive_low`.

    Raises:
        OptionError: naming the option, its value and the interval.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if is_number and math.isfinite(value) and (low < value if exclusive_low else low <= value) and value <= high:
        return value if isinstance(value, int) else float(value)
    bound = f"{'above' if exclusive_low else 'at least'} {low:g}" if math.isfinite(low) else ""
    upper = f"at most {high:g}" if math.isfinite(high) else ""
    wanted = " and ".join(part for part in (bound, upper) if part) or "finite"
    raise OptionError(f"{name}={value!r}: expected a number, {wanted}.")


def check_count(name: str, value: Any, low: int = 1) -> int:
    """Return `value` if it is a whole number of at least `low`.

    Raises:
        OptionError: naming the option and its value.
    """
    if isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= low:
        return int(value)
    raise OptionError(f"{name}={value!r}: expected a whole number of at least {low}.")


def check_counts(name: str, values: Any) -> list[int]:
    """Return `values` if they are a list of whole numbers of at least 1, or an empty one.

    Raises:
        OptionError: naming the option and its value.
    """
    if isinstance(values, list | tuple):
        return [check_count(name, value) for value in values]
    raise OptionError(f"{name}={values!r}: expected a list of whole numbers, such as [64, 64].")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """Return `value` if it is one of `choices`.

    Raises:
        OptionError: naming the option, its value and the choices.
    """
    if value in choices:
        return value
    raise OptionError(f"{name}={value!r}: expected one of {', '.join(map(repr, choices))}.")


def check_ending(name: str, path: str | Path, endings: Sequence[str]) -> str:
    """Return the ending of `path`, in lower case, if it is one of several `endings`.

    Raises:
        OptionError: naming the option, its value and the endings.
    """
    ending = Path(path).suffix.lower()
    if ending in endings:
        return ending
    raise OptionError(f"{name}={str(path)!r}: expected a name that ends in {', '.join(endings[:-1])} or {endings[-1]}.")


def check_flag(name: str, value: Any) -> bool:
    """Return `value` if it is True or False.

    Raises:
        OptionError: naming the option and its value.
    """
    if isinstance(value, bool):
        return value
    raise OptionError(f"{name}={value!r}: expected True or False.")
