"""Writes the tables of options in the documentation: `make docs`.

A table stands between two comments, and is made from signatures and docstrings, those that `**options` reach included:

    <!-- options of PPO -->                        all options of lit_rl.PPO
    <!-- options of DQN, Rainbow -->               of a class, and what another one has besides or in another way
    <!-- options of PPO: lr normalize_returns -->  some of them, in this order
    <!-- end -->
"""

import dataclasses
import inspect
import pydoc
import re
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import docstring_parser

from lit_rl.options import PLAIN, Limit, options_of

PAGES = sorted(Path(__file__).resolve().parent.glob("*.md"))
TABLE = re.compile(r"(<!-- options of ([\w., ]+?)(?:: ([\w ]+))? -->\n).*?(<!-- end -->)", re.S)
# Types without a limit.
WORDS = {str: "a text", dict: "a dict", type: "a class", Sequence: "a list"}


def with_tables(page: str) -> str:
    """The text of a page, with its tables made anew."""
    return TABLE.sub(lambda m: m[1] + table(m[2].split(", "), (m[3] or "").split()) + m[4], page)


def table(names: Sequence[str], chosen: Sequence[str] = ()) -> str:
    """The options of classes in one table.

    Args:
        names: of the classes, below `lit_rl.`. An option that several have stands where the first one has it.
        chosen: names of options; all without.
    """
    classes: list[Any] = [pydoc.locate(f"lit_rl.{name}") for name in names]
    signatures = {cls: options_of(cls) or {} for cls in classes}
    meanings = {name: text for cls in reversed(classes) for name, text in meanings_of(cls).items()}
    lines = ["| name | default | values | meaning |", "|---|---|---|---|"]
    for name in chosen or dict.fromkeys(name for signature in signatures.values() for name in signature):
        options = {cls.__name__: signature[name] for cls, signature in signatures.items() if name in signature}
        annotation = next(iter(options.values())).annotation
        defaults: dict[str, str] = {}
        for cls, option in options.items():
            if (text := default(option.default)) not in defaults.values():
                defaults[cls] = text if cls == classes[0].__name__ else f"{cls}: {text}"
        cells = [f"`{name}`", "; ".join(defaults.values()), words(annotation), meanings[name].rstrip(".")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def meanings_of(cls: type) -> dict[str, str]:
    """What docstrings say of each option; a class's own text replaces its parents'."""
    found = {}
    for doc in (doc for owner in reversed(cls.__mro__) for doc in (owner.__init__.__doc__, owner.__doc__) if doc):
        for argument in docstring_parser.parse(doc, docstring_parser.DocstringStyle.GOOGLE).params:
            found[argument.arg_name] = " ".join((argument.description or "").split()).replace("|", r"\|")
    return found


def default(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return "(needed)"
    if dataclasses.is_dataclass(value):
        return f"`{type(value).__name__}()`"
    if isinstance(value, int) and value >= 10_000:
        return f"`{value:_}`"
    return f'`"{value}"`' if isinstance(value, str) else f"`{value!r}`"


def words(annotation: Any) -> str:
    """What an annotation allows, as error messages say it."""
    if get_origin(annotation) is Annotated:
        return next(repr(extra) for extra in annotation.__metadata__ if isinstance(extra, Limit))
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [words(part) for part in get_args(annotation) if part is not type(None)]
        return " or ".join(parts) + (", or None" if len(parts) < len(get_args(annotation)) else "")
    if dataclasses.is_dataclass(annotation):
        return f"`{annotation.__name__}`"
    if annotation in PLAIN:
        return repr(PLAIN[annotation])
    return WORDS.get(get_origin(annotation) or annotation, "a callable")


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(with_tables(path.read_text()))
