"""What the names of environments and wrappers mean: "package.module:Class"."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import gymnasium as gym

from lit_rl.errors import EnvError, OptionError

Wrapper = str | dict[str, dict[str, Any]] | Callable[[Any], Any]


def entry_point(name: str) -> Callable[..., Any] | None:
    """The class or function `"package.module:name"` means, or None if the string is a gymnasium id."""
    module_name, colon, attribute = name.partition(":")
    if not colon:
        return None
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise EnvError(f"{name!r}: cannot import {module_name!r} ({error}).") from error
    found = getattr(module, attribute, None)
    if found is None and attribute not in gym.registry and "/" not in attribute and "-v" not in attribute:
        raise EnvError(f"{name!r}: the module {module_name!r} has no {attribute!r}.")
    return found


def wrapper_of(wrapper: Wrapper) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What wraps an environment, and with which arguments beside it.

    Args:
        wrapper: a callable, `"package.module:Class"`, or `{"package.module:Class": kwargs}`.
    """
    kwargs: dict[str, Any] = {}
    if isinstance(wrapper, dict):
        if len(wrapper) != 1:
            raise OptionError(f"wrappers: expected one 'package.module:Class' and its kwargs, got {wrapper!r}.")
        ((wrapper, kwargs),) = wrapper.items()
    if isinstance(wrapper, str):
        found = entry_point(wrapper)
        if found is None:
            raise OptionError(f"wrappers: {wrapper!r} is not 'package.module:Class' of something importable.")
        wrapper = found
    if not callable(wrapper):
        raise OptionError(
            f"wrappers: {wrapper!r}: expected a callable, 'package.module:Class', or a dict of one and its kwargs."
        )
    return wrapper, _with_tuples(wrapper, kwargs or {})


def _with_tuples(function: Callable[..., Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments with tuples where they are declared: a YAML file has lists alone, which gymnasium's wrappers refuse."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # a callable that does not say
        return kwargs
    declared = {name for name, p in parameters.items() if str(p.annotation).lower().startswith("tuple")}
    return {k: tuple(v) if k in declared and isinstance(v, list) else v for k, v in kwargs.items()}
