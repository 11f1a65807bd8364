"""The commands, and what all of them share: a parser, a folder to import from, an end in one sentence."""

import os
import sys
import textwrap
from typing import NoReturn

import jsonargparse

OF_LIGHTNING = {  # Lightning's own texts end at a line of a docstring, in the middle of a sentence
    "fit": "Train, with evaluations and checkpoints on the way.",
    "validate": "Play the evaluation's episodes with a checkpoint.",
    "test": "The same, logged under test/ instead of eval/.",
    "predict": "Play episodes with a checkpoint, and write each step to a file.",
}
OWN = {  # each is a function in a module of the same name
    "recipes": "List the recipes that --config finds, with their measured results.",
    "play": "Play a checkpoint in the environment it was trained in, in a window or into a video.",
    "plot": "Draw learning curves. Runs that differ in their seed alone are one curve with a band.",
    "data": "Tell what recorded episodes are like (info), or find everything that is wrong with them (check).",
    "evaluate": "Estimate how good a checkpoint's policy is, by recorded episodes and without an environment.",
}
SUBCOMMANDS = (*OF_LIGHTNING, *OWN)
USAGE = f"lit-rl {{{','.join(SUBCOMMANDS)}}} [--config RECIPE] ..."


def help_text() -> str:
    """What `lit-rl --help` says."""
    commands = "\n".join(f"  {name:10}{text}" for name, text in (OF_LIGHTNING | OWN).items())
    return textwrap.dedent(
        """\
        usage: {usage}

        Reinforcement learning as an ordinary PyTorch Lightning program.

        {commands}

        Each has its own --help: lit-rl fit --help. --debug shows where an error comes from, --version the version.
        Begin with: lit-rl fit --config ppo_cartpole"""
    ).format(usage=USAGE, commands=commands)


def end(message: str, code: int) -> NoReturn:
    """Exit with one sentence."""
    print(f"lit-rl: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def own_parser(command: str) -> jsonargparse.ArgumentParser:
    """The parser of one of the library's own commands, without options yet."""
    return jsonargparse.ArgumentParser(
        prog=f"lit-rl {command}", description=OWN[command], exit_on_error=False, allow_abbrev=False
    )


def import_from_folder() -> None:
    """Find modules in the working folder, as `python -m lit_rl` does: environments and networks of one's own."""
    folder = os.getcwd()
    if not sys.flags.safe_path and not {"", folder} & set(sys.path):
        sys.path.insert(0, folder)
