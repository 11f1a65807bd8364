"""Options of classes: the annotation of an argument is its only check.

    class Heater(TakesOptions):
        def __init__(self, *, power: Positive = 2.0, num_fans: Count = 1, target: UnitInterval | None = None):
            super().__init__()
            self.take_options()

`Heater(power=-1)` raises one sentence, in Python and on the command line. `--help` and the tables in the documentation
show the same limits. A subclass takes its own options and `**options`, which it hands to its parent: the parent checks
and keeps those.
"""

import dataclasses
import functools
import inspect
import math
import re
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar, Union, get_args, get_origin, get_type_hints

from lit_rl import peers
from lit_rl.errors import OptionError, did_you_mean

Made = TypeVar("Made")
LONGEST = 300  # letters of a value that a message shows


class Limit:
    """What values an option may have.

    Its `repr` says so in words: error messages, `--help` and the documentation show it. A subclass defines `accepts`
    and `__repr__`, and is hashable.
    """

    def __call__(self, name: str, value: Any) -> Any:
        """Return `value` in the form in which it is kept.

        Raises:
            OptionError: if it is not accepted. The message names the option, its value and what was expected.
        """
        if not self.accepts(value):
            shown = " ".join(repr(value).split())
            shown = f"a {type(value).__name__}" if len(shown) > LONGEST else shown
            raise OptionError(f"{name}={shown}: expected {self!r}.")
        return self.kept(value)

    def accepts(self, value: Any) -> bool:
        raise NotImplementedError(f"{type(self).__name__} must define accepts(value).")

    def kept(self, value: Any) -> Any:
        """The form in which an accepted value is kept: plain data."""
        return value


@dataclasses.dataclass(frozen=True, repr=False)
class Within(Limit):
    """Finite numbers in [low, high], without an end that is open; with `whole` only whole numbers."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    whole: bool = False

    def accepts(self, value: Any) -> bool:
        is_number = isinstance(value, Integral if self.whole else Real) and not isinstance(value, bool)
        if not (is_number and math.isfinite(value)):
            return False
        above = self.low < value if self.open_low else self.low <= value
        return above and (value < self.high if self.open_high else value <= self.high)

    def kept(self, value: Any) -> float:
        return int(value) if self.whole else float(value)

    def __repr__(self) -> str:
        low = f"{'above' if self.open_low else 'at least'} {self.low:g}" if math.isfinite(self.low) else ""
        high = f"{'below' if self.open_high else 'at most'} {self.high:g}" if math.isfinite(self.high) else ""
        bounds = " and ".join(bound for bound in (low, high) if bound)
        if self.whole:
            return f"a whole number of {bounds}" if bounds else "a whole number"
        return f"a number, {bounds or 'finite'}"


class OneOf(Limit):
    """One of a few words. None may be one of the choices."""

    def __init__(self, *choices: str | None):
        self.choices = choices

    def accepts(self, value: Any) -> bool:
        return value in self.choices

    def __repr__(self) -> str:
        *others, last = map(repr, self.choices)
        return f"{', '.join(others)} or {last}" if None in self.choices else f"one of {', '.join([*others, last])}"


class NumberOr(Limit):
    """A finite number, or one word."""

    def __init__(self, word: str):
        self.word = word

    def accepts(self, value: Any) -> bool:
        return value == self.word or PLAIN[float].accepts(value)

    def kept(self, value: Any) -> float | str:
        return value if value == self.word else float(value)

    def __repr__(self) -> str:
        return f"{PLAIN[float]!r}, or {self.word!r}"


@dataclasses.dataclass(frozen=True, repr=False)
class InstanceOf(Limit):
    """Instances of one of `types`, which `words` name in messages."""

    types: tuple[type, ...]
    words: str

    def accepts(self, value: Any) -> bool:
        return isinstance(value, self.types)

    def __repr__(self) -> str:
        return self.words


class Bytes(Limit):
    """A number of bytes, or a text such as "4GB" or "500 MB"; kept as the number."""

    UNITS = {unit: 1000**power for power, unit in enumerate(("B", "KB", "MB", "GB", "TB"))}
    TEXT = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]?B)")

    def accepts(self, value: Any) -> bool:
        return PLAIN[int].accepts(value) and value > 0 if not isinstance(value, str) else self.kept(value) > 0

    def kept(self, value: Any) -> int:
        if not isinstance(value, str):
            return int(value)
        found = self.TEXT.fullmatch(value.strip().upper())
        return 0 if found is None else int(float(found[1]) * self.UNITS[found[2]])

    def __repr__(self) -> str:
        return "a number of bytes, or a text such as '4GB'"


class ListOfCounts(Limit):
    """A list of whole numbers of at least 1; it may be empty."""

    def __call__(self, name: str, value: Any) -> list[int]:
        return [check(name, number, Count) for number in super().__call__(name, value)]

    def accepts(self, value: Any) -> bool:
        return isinstance(value, list | tuple)

    def __repr__(self) -> str:
        return "a list of whole numbers, such as [64, 64]"


class ListOfNames(Limit):
    """Several texts. A single text is refused: its letters would be taken for them."""

    def accepts(self, value: Any) -> bool:
        is_collection = isinstance(value, Collection) and not isinstance(value, str)
        return is_collection and all(isinstance(name, str) for name in value)

    def kept(self, value: Any) -> tuple[str, ...]:
        return tuple(value)

    def __repr__(self) -> str:
        return "a list of keys"


class ListOfGroups(Limit):
    """Several lists of texts."""

    def accepts(self, value: Any) -> bool:
        return isinstance(value, list | tuple) and all(ListOfNames().accepts(group) for group in value)

    def kept(self, value: Any) -> list[list[str]]:
        return [list(group) for group in value]

    def __repr__(self) -> str:
        return "a list of groups, such as [['a', 'b']]"


class SeveralPaths(Limit):
    """A path or several, as texts or `Path`s; none is an empty text."""

    def accepts(self, value: Any) -> bool:
        paths = [value] if isinstance(value, str | Path) else value
        return (
            isinstance(paths, list | tuple)
            and bool(paths)
            and all(isinstance(x, str | Path) and x != "" for x in paths)
        )

    def kept(self, value: Any) -> tuple[str, ...]:
        return tuple(str(path) for path in ([value] if isinstance(value, str | Path) else value))

    def __repr__(self) -> str:
        return "a path, or a list of paths"


class PathsOrDataset(SeveralPaths):
    """A path or several, or a `ray.data.Dataset`."""

    def accepts(self, value: Any) -> bool:
        return is_dataset(value) or super().accepts(value)

    def kept(self, value: Any) -> Any:
        return value if is_dataset(value) else super().kept(value)

    def __repr__(self) -> str:
        return "a path, or a list of paths, or a ray.data.Dataset"


def is_dataset(value: Any) -> bool:
    """Whether something is a `ray.data.Dataset`. Ray is not imported to know it."""
    return any(cls.__module__ == "ray.data.dataset" and cls.__name__ == "Dataset" for cls in type(value).__mro__)


Positive = Annotated[float, Within(0.0, open_low=True)]
NonNegative = Annotated[float, Within(0.0)]
UnitInterval = Annotated[float, Within(0.0, 1.0)]
Fraction = Annotated[float, Within(0.0, 1.0, open_high=True)]
OpenFraction = Annotated[float, Within(0.0, 1.0, open_low=True, open_high=True)]
PositiveFraction = Annotated[float, Within(0.0, 1.0, open_low=True)]
Count = Annotated[int, Within(1, whole=True)]
CountOrZero = Annotated[int, Within(0, whole=True)]
TwoOrMore = Annotated[int, Within(2, whole=True)]
Counts = Annotated[Sequence[int], ListOfCounts()]
Names = Annotated[Sequence[str], ListOfNames()]
Groups = Annotated[Sequence[Sequence[str]], ListOfGroups()]
Arguments = Annotated[dict[str, Any], InstanceOf((dict,), "a dict of arguments")]
Paths = Annotated[Sequence[str] | str, SeveralPaths()]
ByteSize = Annotated[int | str, Bytes()]
Data = Annotated[Sequence[str] | str, PathsOrDataset()]
Folder = Annotated[str | Path, InstanceOf((str, Path), "a folder's path")]

# The limits of types that are written without one.
PLAIN: dict[Any, Limit] = {
    bool: InstanceOf((bool,), "True or False"),
    int: Within(whole=True),
    float: Within(),
}


def check(name: str, value: Any, annotation: Any) -> Any:
    """Return `value` in the form in which it is kept, if its annotation allows it: `check("lr", 3e-4, Positive)`.

    The annotation is a type with a `Limit`, bool, int, float or a dataclass, or one of these and None. A value of any
    other type is returned as it is.

    Raises:
        OptionError: if it is not allowed. The message names the option, its value and what was expected.
    """
    limit, is_optional = _limit_of(annotation)
    return value if limit is None or (value is None and is_optional) else limit(name, value)


def limit_of(annotation: Any) -> Limit | None:
    """The limit in an annotation, None if there is none."""
    return _limit_of(annotation)[0]


@functools.cache
def _limit_of(annotation: Any) -> tuple[Limit | None, bool]:
    """The limit in an annotation, and whether the annotation allows None too."""
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
    expected = " or ".join([", ".join(endings[:-1]), endings[-1]] if endings[1:] else endings)
    raise OptionError(f"{name}={str(path)!r}: expected a name that ends in {expected}.")


# --- classes that take options --------------------------------------------------------------------------------------


class TakesOptions:
    """Mixin for classes whose `__init__` has options. An unknown option is refused, with a hint.

    Attributes:
        RENAMED: options of earlier versions, and how each is written now.
        BY_NAME: what to say to whoever gives options without their names.
    """

    RENAMED: Mapping[str, str] = {}
    BY_NAME = "expected options by name."

    def __new__(cls, *args: Any, **options: Any) -> Self:
        _check_known(cls, options)
        parameters = inspect.signature(cls.__init__).parameters.values()
        taken = [p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters]
        if len(args) >= sum(taken) > 0 and not any(p.kind is p.VAR_POSITIONAL for p in parameters):  # with self
            raise OptionError(f"{cls.__name__}({', '.join(map(repr, args))}): {cls.BY_NAME}")
        return super().__new__(cls)

    def take_options(self) -> None:
        """Check the arguments of the `__init__` that calls this against their annotations, and keep them.

        Call it after `super().__init__(...)`. The arguments in `**options` are left to the parent's own call.

        Raises:
            OptionError: for the first argument that its annotation does not allow.
        """
        caller = inspect.currentframe().f_back  # type: ignore[union-attr]
        assert caller is not None and "__class__" in caller.f_locals, "to be called by an __init__ with a super()"
        init, code = caller.f_locals["__class__"].__init__, caller.f_code
        annotations = get_type_hints(init, include_extras=True)
        names = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
        kept = {}
        for name in names:
            value = caller.f_locals[name]
            try:
                kept[name] = check(name, value, annotations.get(name))
            except OptionError as error:
                points = hint_on_points(type(self), name) if isinstance(value, list | tuple) or callable(value) else ""
                raise OptionError(f"{error}{points}") from None
        self.keep_options(kept, caller)

    def keep_options(self, options: dict[str, Any], caller: types.FrameType) -> None:
        """Keep checked options, here as attributes.

        Args:
            options: by name, in the form in which they are kept.
            caller: the frame of the `__init__`.
        """
        for name, value in options.items():
            setattr(self, name, value)


def _check_known(cls: type, names: Iterable[str]) -> None:
    """Refuse options that a class does not have."""
    known = options_of(cls)
    for name in names:
        if known is not None and name not in known:
            raise OptionError(f"{cls.__name__}({name}=...): there is no such option.{hint(cls, name)}")


def options_of(cls: type) -> dict[str, inspect.Parameter] | None:
    """The options of a class by name, its own before those of its parents; None if it takes any.

    A parent's count as far as `**options` reach it.
    """
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
    """What an option that a class does not have may stand for: one sentence after a space, or "".

    Args:
        cls: the class.
        name: of the option; with dots as on the command line for a part of it, "evaluation.episods".
    """
    options = options_of(cls) or {}
    whole, _, part = name.partition(".")
    if whole in options and dataclasses.is_dataclass(options[whole].annotation):
        return hint(options[whole].annotation, part)
    renamed = getattr(cls, "RENAMED", {}).get(whole)
    if renamed is not None:
        return f" It is called {renamed} now."
    asked = part or whole
    for ours in peers.OPTIONS.get(asked, ()):
        if ours in options:
            return f" It is called {ours!r} here{_note(asked, ours)}."
    elsewhere = () if asked in options else (asked, *peers.OPTIONS.get(asked, ()))
    for owner in peers.owners(cls):
        for ours in elsewhere:
            if ours in (options_of(owner) or {}):
                called = "It" if ours == asked else f"It is called {ours!r} here{_note(asked, ours)}, and"
                return f" {called} is an option of {owner.__name__}."
    return did_you_mean(asked, [option for option in options if option != name])


def _note(theirs: str, ours: str) -> str:
    note = peers.NOTES.get((theirs, ours))
    return "" if note is None else f" ({note})"


def hint_on_points(cls: type, name: str) -> str:
    """What to say if no number is given for one that has a schedule: one sentence after a space, or ""."""
    has_schedule = f"{name}_schedule" in (options_of(cls) or {})
    return f" Points [[env_step, value], ...] go to {name}_schedule." if has_schedule else ""


# --- options that are a dataclass -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class OptionFields:
    """Base of frozen dataclasses whose fields are options. An unknown option is refused, with a hint."""

    def __new__(cls, *args: Any, **options: Any) -> Self:
        _check_known(cls, options)
        return super().__new__(cls)


def check_fields(options: Any, prefix: str = "") -> None:
    """Check the fields of a dataclass against their annotations. Call it in `__post_init__`.

    Args:
        options: the dataclass. Its values are replaced by the forms in which they are kept.
        prefix: of the names in messages, such as "evaluation.".

    Raises:
        OptionError: for the first field that its annotation does not allow.
    """
    annotations = get_type_hints(type(options), include_extras=True)
    for field in dataclasses.fields(options):
        value = check(f"{prefix}{field.name}", getattr(options, field.name), annotations[field.name])
        object.__setattr__(options, field.name, value)  # the dataclass may be frozen


def with_fields_of(options: type) -> Callable[[Made], Made]:
    """Decorator of an `__init__(self, ..., **options)` that also takes the fields of a dataclass, by `taken`.

    Its signature and docstring then have them, for `--help`, configs and the documentation.
    """

    def decorate(init: Any) -> Any:
        *own, rest = inspect.signature(init).parameters.values()
        annotations = get_type_hints(options, include_extras=True)
        fields = [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=annotations[f.name])
            for f in dataclasses.fields(options)
        ]
        init.__signature__ = inspect.Signature([*own, *fields, rest])
        init.__annotations__ = init.__annotations__ | {p.name: p.annotation for p in fields}
        init.__doc__ = options.__doc__
        return init

    return decorate


def taken(cls: type[Made], options: dict[str, Any]) -> Made:
    """A dataclass of those `options` that are its fields. They are removed from `options`."""
    names = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    return cls(**{name: options.pop(name) for name in list(options) if name in names})
