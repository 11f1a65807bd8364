"""The commands that train nothing, each in a module of its name: they need no Lightning, whose import takes seconds."""

import importlib
from collections.abc import Sequence

import jsonargparse

COMMANDS = ("recipes", "play", "plot", "data")


def run(arguments: Sequence[str]) -> None:
    """Run the command that the arguments begin with."""
    name = arguments[0]
    getattr(importlib.import_module(f"lit_rl.cli.{name}"), name)(arguments[1:])


def make_parser(name: str, description: str) -> jsonargparse.ArgumentParser:
    return jsonargparse.ArgumentParser(
        prog=f"lit-rl {name}", description=description, exit_on_error=False, allow_abbrev=False
    )
