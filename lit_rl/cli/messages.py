"""What the command line says when something is wrong: one sentence."""

import ast
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, get_args

import jsonargparse
import lightning.pytorch.callbacks
import lightning.pytorch.loggers
import wandb.errors
from lightning.fabric.utilities.exceptions import MisconfigurationException

import lit_rl
from lit_rl.cli.configs import class_of, suggestion
from lit_rl.cli.recipe_index import recipe_files
from lit_rl.cli.shared import end
from lit_rl.errors import LitRLError, OptionError, did_you_mean
from lit_rl.networks import NETWORKS
from lit_rl.options import Limit, ListOfCounts, ListOfGroups, ListOfNames, limit_of, options_of
from lit_rl.peers import hint_on_class

# What to give where it is missing; a recipe otherwise.
NEEDED = {
    "checkpoint": "Give a checkpoint file: lit-rl {command} runs/ppo_cartpole/version_0/checkpoints/last.ckpt",
    "what": "Give what to do and where: lit-rl data info runs/ppo_cartpole/version_0/episodes",
    "episodes": "Give their folder: lit-rl data info runs/ppo_cartpole/version_0/episodes",
    "paths": "Give recorded episodes, or a recipe: --data.paths DIR, --config bc_cartpole",
    "runs": "Give the folder of a run, or of several: lit-rl plot runs/ppo_cartpole",
}
TOP = ("config", "seed_everything", "trainer", "model", "data", "ckpt_path", "init_from", "cluster", "out")
TYPES = {
    "float": "a number",
    "int": "a whole number",
    "bool": "True or False",
    "str": "a text",
    "dict": "a dict, such as {a: 1}",
    "list": "a list, such as [a, b]",
    "tuple": "a list, such as [a, b]",
    "collections.abc.Mapping": "a dict, such as {a: 1}",
    "collections.abc.Sequence": "a list, such as [a, b]",
}


def fail(error: Exception, arguments: Sequence[str]) -> NoReturn:
    """Exit with one sentence on what was raised, if a user can mend it; else raise it."""
    own = own_error(error)
    if own is None and not isinstance(error, jsonargparse.ArgumentError):
        raise error
    said = sentence(error, arguments) if own is None else str(own)
    end(said, 2 if own is None or isinstance(own, OptionError | MisconfigurationException) else 1)


def sentence(error: BaseException, arguments: Sequence[str]) -> str:
    """jsonargparse's nested, many-lined message as one line: the key, the innermost complaint, the value given.

    Args:
        error: what jsonargparse raised.
        arguments: of the command.
    """
    text = str(error)
    noise = r"Subtypes:|Errors:|Given value|Expected (a )?<class 'NoneType'>|Problem with given class_path"
    lines = [line.strip(" -") for line in text.splitlines() if line.strip() and not re.search(noise, line)]
    key = (re.findall(r"[Pp]arser key [\"']([\w.]+)[\"']", text) or [""])[-1]
    complaint = re.sub(r"[Pp]arser key [\"'][\w.]+[\"']:?\s*", "", lines[-1] if lines else text).strip()
    after_key = text.rpartition("arser key ")[2]  # the first value there is that of the key, the last the whole class's
    given = (re.findall(r"(?:Given|Got) value: (\S.*)", after_key) or [""])[0]
    nested = re.search(r"Given value: NestedArg\(key='([\w.]+)', val=(.*)\)$", text)
    if nested:  # `--model.lr x` on the command line
        if nested[1].startswith(f"{key}."):
            key = nested[1]
        key = key if key.endswith(nested[1]) else f"{key or 'option'}.{nested[1]}"
        given = ast.literal_eval(nested[2]) if nested[2][:1] in "'\"" else nested[2]
    named = re.findall(r"Expected a dot import path string: (\S+)", text)[-1:]
    not_found = re.findall(r"expects a function or a callable class: (.*\S)", text)[-1:]
    unknown = re.findall(r"Option '(\w+)' is not accepted", text)[-1:]
    if key.startswith("replay."):
        unknown = unknown or re.findall(r"unrecognized arguments: --(?:\w+\.)*(\w+)=", text)[-1:]
    if unknown and key.startswith(("policies", "replay")):  # of what else they may be jsonargparse goes on to speak
        complaint = f"there is no option {unknown[0]!r}"
        if key.startswith("replay"):
            given, text = "", text[text.rindex("Problem with given class_path") :]
    elif listed := _list_of(key, text):
        complaint, given = f"expected {listed}.", (re.findall(r"Given value: (\S.*)", after_key) or [given])[0]
    elif named:  # jsonargparse says no more, also where the class is there and its init_args are wrong
        complaint = _no_class(key, named[0])
    elif not_found:
        complaint = f"there is no class {given}: {not_found[0]}."
    elif complaint.startswith("Expected a <class"):
        complaint = _expected(lines)
    needed = re.search(r"arguments are required: (\w+)", complaint)
    if needed:
        complaint += f". {NEEDED.get(needed[1], '').format(command=arguments[0]) or _config_of(arguments)}"
    complaint += _too_early(key, arguments) or suggestion(text) or _of_the_top(text)
    value = f"={given}" if given and len(given) < 80 else ""
    return f"{key}{value}: {complaint}" if key else complaint


def _of_the_top(text: str) -> str:
    """What an unknown argument, or the first part of an unknown key, may stand for; "" if that is not known."""
    found = re.search(r"[Uu]nrecognized arguments: (\S+)|does not accept option '([\w]+)", text)
    if found is None:
        return ""
    name = (found[1] or found[2]).partition("=")[0]
    if not name.startswith("-") and name in recipe_files():
        return f". It is a recipe: --config {name}"
    dashes = "--" if name.startswith("--") else ""
    said = did_you_mean(name.lstrip("-").partition(".")[0], TOP).replace("'", f"'{dashes}", 1)
    return f".{said}" if said else ""


def _config_of(arguments: Sequence[str]) -> str:
    """Which config to give: that of the run whose checkpoint is asked for, if it is there."""
    for name, value in zip(arguments, [*arguments[1:], ""]):
        name, _, joined = name.partition("=")
        config = Path(joined or value).parent.parent / "config.yaml"  # <run>/checkpoints/last.ckpt
        if name == "--ckpt_path" and config.is_file():
            return f"Give the config of its run: --config {config}"
    return "Give a recipe: --config ppo_cartpole"


def _expected(lines: Sequence[str]) -> str:
    """The alternatives that the last lines of jsonargparse's message name, in words."""
    words: list[str] = []
    for line in reversed(lines):
        found = re.match(r"Expected a <class '([\w.]+)'>", line)
        if found is None:
            break
        words.insert(0, TYPES.get(found[1], f"a {found[1].rpartition('.')[2]}"))
    return f"expected {' or '.join(dict.fromkeys(words))}."


def _list_of(key: str, text: str) -> str:
    """What is expected of an option that takes a list, in its own words; "" of another option."""
    for class_path in re.findall(r"class_path '([\w.]+)'", text)[-1:]:
        owner = class_of(class_path)
        option = (options_of(owner) or {}).get(key.rpartition(".")[2]) if owner is not None else None
        for kind in () if option is None else (option.annotation, *get_args(option.annotation)):
            limit = kind if isinstance(kind, Limit) else limit_of(kind)
            if isinstance(limit, ListOfCounts | ListOfNames | ListOfGroups):
                return repr(limit)
    return ""


def _no_class(key: str, name: str) -> str:
    if name.rpartition(".")[2] in NETWORKS:
        return f"{name}: a class or option inside its init_args is misspelt"
    if not key.endswith(("network", "encoder")):
        known = _classes_for(key)
        hint = hint_on_class(name, known)
        if not hint and key in ("model", "data"):
            hint = f" There are {', '.join(sorted(known))}."
        return f"there is no class {name}.{hint}" if hint else f"there is no class {name}"
    hint = did_you_mean(name, NETWORKS) or f" There are {', '.join(sorted(NETWORKS))}."
    return f"there is no class {name}.{hint} One of your own is named package.module.Class."


def _classes_for(key: str) -> list[str]:
    """The names of the classes that an option takes without their modules."""
    if key == "model":
        return [*_of("lit_rl.modules"), "MultiAgent"]
    if key == "data":
        return _of("lit_rl.datamodules")
    if key.startswith("trainer.callbacks"):
        return [*_of("lit_rl.callbacks"), *lightning.pytorch.callbacks.__all__]
    return list(lightning.pytorch.loggers.__all__) if key.startswith("trainer.logger") else []


def _of(module: str) -> list[str]:
    return [name for name, where in lit_rl.PUBLIC.items() if where == module]


def _too_early(key: str, arguments: Sequence[str]) -> str:
    """What to do where an option stands before the class it belongs to; "" where it does not."""
    group, _, option = key.partition(".")
    names = [argument.partition("=")[0] for argument in arguments]
    classes = [i for i, name in enumerate(names) if name == f"--{group}"]
    first = next((i for i, name in enumerate(names) if name.startswith(f"--{group}.{option}")), None)
    if not option or not classes or first is None or first > classes[-1]:
        return ""
    given = " ".join(arguments[classes[-1] :][: 1 if "=" in arguments[classes[-1]] else 2])
    return f". Put {given} before it"


def own_error(error: BaseException | None) -> LitRLError | MisconfigurationException | None:
    """Ours among the errors that led to this one: jsonargparse wraps what a class's `__init__` raises."""
    while error is not None and not isinstance(error, LitRLError | MisconfigurationException):
        if isinstance(error, wandb.errors.UsageError):
            return OptionError(f"trainer.logger=WandbLogger: {error} Without an account: WANDB_MODE=offline.")
        unknown = re.match(r"Early stopping conditioned on metric `([^`]*)` which is not available", str(error))
        if unknown:
            return OptionError(
                f"EarlyStopping(monitor={unknown[1]!r}): nothing of this name was logged before the end of the first "
                "epoch it looks at. `eval/*` is there once an evaluation has ended; strict=False waits for it."
            )
        error = error.__cause__ or error.__context__
    return error
