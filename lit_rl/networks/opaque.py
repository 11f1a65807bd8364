"""Loops that a compiled update calls without looking inside.

A compiler that looks inside writes out every step, and is not done with 64 of them after many minutes. Here a loop is
one operator to it. One step of the loop is compiled by itself, and is called as often as the loop goes round.
"""

import weakref
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import nn

_LIBRARY = torch.library.Library("lit_rl", "DEF")
_MODULES: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()
_STEPS: dict[Any, Callable[..., Any]] = {}


def operator(schema: str, function: Callable[..., Any], results: Callable[..., Any]) -> Callable[..., Any]:
    """A function as an operator of torch's, through which no gradient goes by itself.

    Args:
        schema: name, arguments and results, as torch's operators have them.
        function: what is called.
        results: returns empty tensors of the shapes that the function's have.
    """
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lit_rl::{name}", results, lib=_LIBRARY)
    return getattr(torch.ops.lit_rl, name).default


def step_of(function: Callable[..., Any], compiled: bool, *key: Any) -> Callable[..., Any]:
    """One step of a loop: the function, or its compiled form, of which there is one for each key.

    The compiler keeps what it compiled with the code it was given: a copy of its own for each key.
    """
    if not compiled:
        return function
    if (function, *key) not in _STEPS:
        own = FunctionType(function.__code__.replace(), function.__globals__, closure=function.__closure__)
        options: dict[str, Any] = {"size_asserts": False, "cpp_wrapper": not torch.cuda.is_available()}
        _STEPS[function, *key] = torch.compile(own, fullgraph=True, dynamic=False, options=options)
    return _STEPS[function, *key]


@torch.compiler.assume_constant_result
def key_of(module: nn.Module) -> int:
    """By which an operator, which takes numbers and tensors alone, knows a module: see `module_of`.

    The operator reads the module's own parameters, which a compiled update moves only after that.
    """
    _MODULES[id(module)] = module
    return id(module)


def module_of(key: int) -> Any:
    """The module of a key."""
    return _MODULES[key]
