"""Config files before they are parsed, and what may have been meant by an option that does not exist."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import yaml

from lit_rl.errors import OptionError
from lit_rl.options import hint

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


def suggestion(message: str) -> str:
    """ " Did you mean ...?" for jsonargparse's message on an option that does not exist; "" if nothing is like it."""
    found = re.search(r"(?i:option) '([\w.]+)'|--([\w.]+)", message)
    if found is None:
        return ""
    name = found[1] or found[2]
    owner: type | None = L.Trainer if name.startswith("trainer.") else None
    for class_path in re.findall(r"class_path '([\w.]+)'", message)[-1:]:
        module, _, attribute = class_path.rpartition(".")
        owner = getattr(importlib.import_module(module), attribute, None)
    if owner is None:
        return ""
    said = hint(owner, name.rpartition(".")[2])
    return f".{said}" if said else ""


def _nodes(node: yaml.Node) -> Iterator[yaml.Node]:
    yield node
    children = node.value if isinstance(node, yaml.CollectionNode) else ()
    for child in children:
        for part in child if isinstance(child, tuple) else (child,):
            yield from _nodes(part)
