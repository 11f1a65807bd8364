"""Config files before they are parsed, and what may have been meant by an option that does not exist."""

import contextlib
import dataclasses
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonargparse
import lightning as L
import yaml

import lit_rl
from lit_rl.errors import OptionError
from lit_rl.options import hint, hint_on_points, options_of

PLAIN = "tag:yaml.org,2002:"  # what YAML's own tags begin with


def check_config(path: str) -> None:
    """Refuse a config file that is no YAML mapping, says a key twice (YAML takes the last), or names Python objects.

    Raises:
        OptionError: naming the file and the line.
    """
    try:
        root = yaml.compose(Path(path).read_bytes().decode())
    except UnicodeDecodeError as error:
        raise OptionError(f"config={path!r} is not UTF-8: {error}.") from error
    except OSError as error:
        raise OptionError(f"config={path!r} cannot be read: {error}.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise OptionError(f"config={path!r}{where}: {getattr(error, 'problem', None) or error}.") from error
    if not isinstance(root, yaml.MappingNode):
        raise OptionError(f"config={path!r}: expected a mapping with model, data and trainer.")
    for node in _nodes(root):
        line = f"config={path!r}, line {node.start_mark.line + 1}"
        if not node.tag.startswith(PLAIN) or node.tag.startswith(f"{PLAIN}python"):
            raise OptionError(f"{line}: the tag {node.tag.replace(PLAIN, '!!')}: expected plain values.")
        keys: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.value != "<<" and key.value in keys:
                raise OptionError(
                    f"config={path!r}, line {key.start_mark.line + 1}: the key {key.value!r} is there a second time. "
                    "Leave one of them out."
                )
            keys.add(key.value if isinstance(key, yaml.ScalarNode) else "")


@contextlib.contextmanager
def own_names_first() -> Iterator[None]:
    """A class's name without a module means lit_rl's own, if there is one that fits.

    By itself jsonargparse refuses a name of which it knows two classes: torchrl and torchvision have an MLP too.
    """
    typehints: Any = jsonargparse._typehints
    by_name = typehints.resolve_class_path_by_name

    def resolve(kinds: Any, name: str) -> str:
        own = getattr(lit_rl, name, None) if "." not in name else None
        of = tuple(kind for kind in (kinds if isinstance(kinds, tuple) else (kinds,)) if isinstance(kind, type))
        if isinstance(own, type) and issubclass(own, of):
            return f"{own.__module__}.{own.__qualname__}"
        return by_name(kinds, name)

    typehints.resolve_class_path_by_name = resolve
    try:
        yield
    finally:
        typehints.resolve_class_path_by_name = by_name


def suggestion(message: str) -> str:
    """What to add to jsonargparse's message on an option that does not exist, or on points in place of a number.

    " Did you mean ...?" and its like; "" if there is nothing to add.
    """
    owner: type | None = None
    for class_path in re.findall(r"class_path '([\w.]+)'", message)[-1:]:
        owner = class_of(class_path)
    found = re.search(r"(?:Group '([\w.]+)' does not accept )?(?i:option) '([\w.]+)'|--([\w.]+)", message)
    if found is None:
        key, _, rest = message.rpartition('key "')[2].partition('"')
        return hint_on_points(owner, key) if owner is not None and "value: [[" in rest else ""
    name = ".".join(filter(None, found.groups()))
    if owner is None and name.startswith("trainer."):
        owner, name = L.Trainer, name.removeprefix("trainer.")
    said = "" if owner is None else hint(owner, name)
    # Where Python has evaluation=Evaluation(episodes=3), the command line and YAML have evaluation.episodes.
    return re.sub(r"(\w+)=\w+\((\w+)=\.\.\.\)", r"\1.\2", f".{said}") if said else ""


def check_groups(name: str, config: Any) -> None:
    """Refuse None or a number in place of the options of a dataclass, as in `evaluation: 3`.

    Args:
        name: "data", for messages.
        config: a parsed class with its arguments.

    Raises:
        OptionError: naming the option and its value.
    """
    cls = class_of(config.class_path)
    options = (options_of(cls) if cls is not None else None) or {}
    for option, value in config.get("init_args", {}).items():
        kind = options[option].annotation if option in options else None
        if isinstance(kind, type) and dataclasses.is_dataclass(kind) and not hasattr(value, "items"):
            fields = ", ".join(field.name for field in dataclasses.fields(kind))
            raise OptionError(f"{name}.{option}={value!r}: expected a dict of {fields}. Leave it out for the defaults.")


def class_of(class_path: str) -> type | None:
    """The class of a path in a config; None if it is a function."""
    module, _, attribute = class_path.rpartition(".")
    found = getattr(importlib.import_module(module), attribute, None)
    return found if isinstance(found, type) else None  # it may be a function that returns an object


def _nodes(node: yaml.Node) -> Iterator[yaml.Node]:
    yield node
    children = node.value if isinstance(node, yaml.CollectionNode) else ()
    for child in children:
        for part in child if isinstance(child, tuple) else (child,):
            yield from _nodes(part)
