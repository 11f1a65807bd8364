"""Options: the annotation of an argument says what it may be, and everything else follows from that.

    class Heater(TakesOptions):
        def __init__(self, *, power: Positive = 2.0, num_fans: Count = 1, target: UnitInterval | None = None):
            super().__init__()
            self.take_options()

`Heater(power=-1)` and the same on the command line are refused by one sentence, `--help` shows the ranges, and the
tables of the documentation are made from them. A class that is another with a few options more takes `**options` and
hands them to its parent, which then checks its own.
"""

import dataclasses
import difflib
import functools
import inspect
import math
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar, Union, get_args, get_origin, get_type_hints

from lit_rl.errors import OptionError

Made = TypeVar("Made")


class Limit:
    """What values an option may have. Its `repr` says so in words, and is what `--help` shows.

    A subclass gives `accepts` and a `repr`; it is hashable.
    """

    def __call__(self, name: str, value: Any) -> Any:
        """Return `value` as it is kept.

        Raises:
            OptionError: naming the option, its value and what was expected.
        """
        if not self.accepts(value):
            raise OptionError(f"{name}={value!r}: expected {self!r}.")
        return self.kept(value)

    def accepts(self, value: Any) -> bool:
        raise NotImplementedError(f"{type(self).__name__} must define accepts(value).")

    def kept(self, value: Any) -> Any:
        """An accepted value in the form in which it is kept: plain data."""
        return value


@dataclasses.dataclass(frozen=True, repr=False)
class Within(Limit):
    """Finite numbers in [low, high], or in (low, high] with `open_low`; `whole` ones alone."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    whole: bool = False

    def accepts(self, value: Any) -> bool:
        is_number = isinstance(value, Integral if self.whole else Real) and not isinstance(value, bool)
        if not (is_number and math.isfinite(value)):
            return False
        return (self.low < value if self.open_low else self.low <= value) and value <= self.high

    def kept(self, value: Any) -> float:
        return int(value) if self.whole else float(value)

    def __repr__(self) -> str:
        if self.whole:
            return f"a whole number of at least {self.low}" if math.isfinite(self.low) else "a whole number"
        low = f"{'above' if self.open_low else 'at least'} {self.low:g}" if math.isfinite(self.low) else ""
        high = f"at most {self.high:g}" if math.isfinite(self.high) else ""
        return f"a number, {' and '.join(part for part in (low, high) if part) or 'finite'}"


class OneOf(Limit):
    """One of a few words; `None` may be among them."""

    def __init__(self, *choices: str | None):
        self.choices = choices

    def accepts(self, value: Any) -> bool:
        return value in self.choices

    def __repr__(self) -> str:
        *others, last = map(repr, self.choices)
        return f"{', '.join(others)} or {last}" if None in self.choices else f"one of {', '.join([*others, last])}"


class NumberOr(Limit):
    """A finite number, or a word in place of one."""

    def __init__(self, word: str):
        self.word = word

    def __call__(self, name: str, value: Any) -> Any:
        return value if value == self.word else check(name, value, float)

    def __repr__(self) -> str:
        return f"{PLAIN[float]!r}, or {self.word!r}"


@dataclasses.dataclass(frozen=True, repr=False)
class InstanceOf(Limit):
    """What is an instance of one of a few types, which `words` name."""

    types: tuple[type, ...]
    words: str

    def accepts(self, value: Any) -> bool:
        return isinstance(value, self.types)

    def __repr__(self) -> str:
        return self.words


class ListOfCounts(Limit):
    """A list of whole numbers of at least 1, or an empty one."""

    def __call__(self, name: str, value: Any) -> list[int]:
        return [check(name, number, Count) for number in super().__call__(name, value)]

    def accepts(self, value: Any) -> bool:
        return isinstance(value, list | tuple)

    def __repr__(self) -> str:
        return "a list of whole numbers, such as [64, 64]"


class ListOfNames(Limit):
    """Texts, which a single text is not."""

    def accepts(self, value: Any) -> bool:
        return not isinstance(value, str)

    def kept(self, value: Any) -> tuple[str, ...]:
        return tuple(value)

    def __repr__(self) -> str:
        return "a list of keys"


Positive = Annotated[float, Within(0.0, open_low=True)]
NonNegative = Annotated[float, Within(0.0)]
UnitInterval = Annotated[float, Within(0.0, 1.0)]
PositiveFraction = Annotated[float, Within(0.0, 1.0, open_low=True)]
Count = Annotated[int, Within(1, whole=True)]
CountOrZero = Annotated[int, Within(0, whole=True)]
TwoOrMore = Annotated[int, Within(2, whole=True)]
Counts = Annotated[Sequence[int], ListOfCounts()]
Names = Annotated[Sequence[str], ListOfNames()]
Arguments = Annotated[dict[str, Any], InstanceOf((dict,), "a dict of arguments")]
Folder = Annotated[str | Path, InstanceOf((str, Path), "a folder's path")]

# Types that need no more than their name.
PLAIN: dict[Any, Limit] = {
    bool: InstanceOf((bool,), "True or False"),
    int: Within(whole=True),
    float: Within(),
}


def check(name: str, value: Any, annotation: Any) -> Any:
    """Return `value` as it is kept, if it is what `annotation` says: `check("lr", 3e-4, Positive)`.

    A bool, int or float needs no limit to be checked. Of a union with None the other part counts, if it is one. What
    else an annotation says is not looked at.

    Raises:
        OptionError: naming the option, its value and what was expected.
    """
    limit, is_optional = _limit_of(annotation)
    return value if limit is None or (value is None and is_optional) else limit(name, value)


@functools.cache
def _limit_of(annotation: Any) -> tuple[Limit | None, bool]:
    """The limit in an annotation, and whether it allows None besides."""
    if get_origin(annotation) is Annotated:
        return next((extra for extra in annotation.__metadata__ if isinstance(extra, Limit)), None), False
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [part for part in get_args(annotation) if part is not type(None)]
        return (_limit_of(parts[0])[0] if len(parts) == 1 else None), len(parts) < len(get_args(annotation))
    if dataclasses.is_dataclass(annotation):
        assert isinstance(annotation, type)
        return InstanceOf((annotation,), f"{annotation.__name__}(...)"), False
    return PLAIN.get(annotation), False


def check_ending(name: str, path: str | Path, endings: Sequence[str]) -> str:
    """Return the ending of `path`, in lower case, if it is one of several `endings`.

    Raises:
        OptionError: naming the option, its value and the endings.
    """
    ending = Path(path).suffix.lower()
    if ending in endings:
        return ending
    raise OptionError(f"{name}={str(path)!r}: expected a name that ends in {', '.join(endings[:-1])} or {endings[-1]}.")


# --- classes that take options --------------------------------------------------------------------------------------


class TakesOptions:
    """Mixin of classes whose `__init__` has options. An option that does not exist is refused with the like of it.

    Attributes:
        RENAMED: what options of earlier versions are called now.
    """

    RENAMED: Mapping[str, str] = {}

    def __new__(cls, *args: Any, **options: Any) -> Self:
        known = options_of(cls)
        for name in options:
            if known is not None and name not in known:
                raise OptionError(f"{cls.__name__}({name}=...): there is no such option.{hint(cls, name)}")
        return super().__new__(cls)

    def take_options(self) -> None:
        """Check the arguments of the `__init__` that calls this by their annotations, and keep them.

        Raises:
            OptionError: naming the first that is not what its annotation says.
        """
        caller = inspect.currentframe().f_back  # type: ignore[union-attr]
        assert caller is not None and "__class__" in caller.f_locals, "to be called by an __init__ with a super()"
        init = caller.f_locals["__class__"].__init__
        hints = get_type_hints(init, include_extras=True)
        code = caller.f_code
        named = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]  # **options are the parents'
        self.keep_options({name: check(name, caller.f_locals[name], hints.get(name)) for name in named}, caller)

    def keep_options(self, options: dict[str, Any], caller: types.FrameType) -> None:
        """Keep checked options: as attributes of their names."""
        for name, value in options.items():
            setattr(self, name, value)


def options_of(cls: type) -> dict[str, inspect.Parameter] | None:
    """The arguments of a class by name, with those that `**options` hand on to its parents; None if it takes any."""
    found: dict[str, inspect.Parameter] = {}
    for owner in cls.__mro__:
        if "__init__" not in vars(owner) or owner is object:
            continue
        parameters = list(inspect.signature(owner.__init__).parameters.values())[1:]  # type: ignore[misc]
        for parameter in parameters:
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                found.setdefault(parameter.name, parameter)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return found
    return None


def hint(cls: type, name: str) -> str:
    """What to say of an option that a class does not have: its name now, or one like it; "" if there is none."""
    renamed = getattr(cls, "RENAMED", {}).get(name)
    if renamed is not None:
        return f" It is called {renamed} now."
    close = difflib.get_close_matches(name, [option for option in options_of(cls) or () if option != name], n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


# --- options that are a dataclass -----------------------------------------------------------------------------------


def check_fields(options: Any, prefix: str = "") -> None:
    """Check each field of a dataclass by its annotation, from its `__post_init__`; the messages name it with `prefix`.

    Raises:
        OptionError: naming the first that is not what its annotation says.
    """
    for name, value, annotation in _fields(options):
        object.__setattr__(options, name, check(f"{prefix}{name}", value, annotation))  # it may be frozen


def _fields(options: Any) -> Iterator[tuple[str, Any, Any]]:
    hints = get_type_hints(type(options), include_extras=True)
    for field in dataclasses.fields(options):
        yield field.name, getattr(options, field.name), hints[field.name]


def with_fields_of(options: type) -> Callable[[Made], Made]:
    """Decorator of an `__init__` with `**options`: it takes the fields of a dataclass too, which `taken` then takes.

    The signature says so, for `--help`, configs and the documentation.
    """

    def decorate(init: Any) -> Any:
        *own, rest = inspect.signature(init).parameters.values()
        hints = get_type_hints(options, include_extras=True)
        fields = [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
            for f in dataclasses.fields(options)
        ]
        init.__signature__ = inspect.Signature([*own, *fields, rest])
        init.__annotations__ = init.__annotations__ | {p.name: p.annotation for p in fields}
        return init

    return decorate


def taken(cls: type[Made], options: dict[str, Any]) -> Made:
    """A dataclass made of those of `options` that are its fields, which are taken out of them."""
    names = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    return cls(**{name: options.pop(name) for name in list(options) if name in names})
