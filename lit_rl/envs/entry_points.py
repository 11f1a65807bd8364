"""What the names of environments and wrappers mean: "package.module:Class"."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import gymnasium as gym

from lit_rl.errors import EnvError, OptionError, did_you_mean

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

    Raises:
        OptionError: if it is none of these.
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
    kwargs = {} if kwargs is None else kwargs
    if not isinstance(kwargs, dict):
        raise OptionError(f"wrappers: {_name(wrapper)}: {kwargs!r}: expected a dict of its options by name.")
    return wrapper, _with_tuples(wrapper, kwargs)


def check_arguments(wrapper: Callable[..., Any], kwargs: dict[str, Any]) -> None:
    """Refuse arguments that a wrapper does not take, and that there is one too few.

    Raises:
        OptionError: naming the first.
    """
    taken = _parameters(wrapper)
    if not taken:
        return
    parameters = taken[1:]  # without the environment
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    unknown = [option for option in kwargs if option not in named]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in taken):
        hint = did_you_mean(unknown[0], named)
        raise OptionError(f"wrappers: {_name(wrapper)}({unknown[0]}=...): there is no such option.{hint}")
    missing = [option for option, p in named.items() if p.default is p.empty and option not in kwargs]
    if missing:
        options = ", ".join(f"{option!r}: ..." for option in missing)
        raise OptionError(
            f"wrappers: {_name(wrapper)} needs {missing[0]}=. Give it a dict of its options, "
            f"{{'package.module:{_name(wrapper)}': {{{options}}}}}."
        )


def _name(wrapper: Callable[..., Any]) -> str:
    return getattr(wrapper, "__name__", repr(wrapper))


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters of a callable; none if it does not say."""
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return []


def _with_tuples(function: Callable[..., Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments with tuples where they are declared: a YAML file has lists alone, which gymnasium's wrappers refuse."""
    declared = {p.name for p in _parameters(function) if str(p.annotation).lower().startswith("tuple")}
    return {k: tuple(v) if k in declared and isinstance(v, list) else v for k, v in kwargs.items()}
