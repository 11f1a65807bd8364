"""The commands that train nothing, each in a module of its name: they need no Lightning, whose import takes seconds."""

import importlib
import os
import sys
import warnings
from collections.abc import Sequence

import jsonargparse

COMMANDS = ("recipes", "play", "plot", "data")


def run(arguments: Sequence[str]) -> None:
    """Run the command that the arguments begin with."""
    one_line_warnings()
    import_from_folder()
    name = arguments[0]
    getattr(importlib.import_module(f"lit_rl.cli.{name}"), name)(arguments[1:])


def one_line_warnings() -> None:
    """A warning is its sentence alone."""
    warnings.formatwarning = lambda message, *_, **__: f"{' '.join(str(message).split())}\n"


def import_from_folder() -> None:
    """Find modules in the working folder, as `python -m lit_rl` does: environments and networks of one's own."""
    folder = os.getcwd()
    if not sys.flags.safe_path and not {"", folder} & set(sys.path):
        sys.path.insert(0, folder)


def make_parser(name: str, description: str) -> jsonargparse.ArgumentParser:
    return jsonargparse.ArgumentParser(
        prog=f"lit-rl {name}", description=description, exit_on_error=False, allow_abbrev=False
    )
