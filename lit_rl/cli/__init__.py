"""The command line: `lit-rl` and `python -m lit_rl`.

PyTorch and Lightning take seconds to import: nothing here does, nor do the library's own commands before they have read
their options, so that help is there at once.
"""

import difflib
import importlib
import os
import sys
import textwrap
from collections.abc import Sequence
from typing import NoReturn

import jsonargparse

import lit_rl
from lit_rl.cli.quiet import quieten
from lit_rl.errors import LitRLError, OptionError

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


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of `lit-rl` and `python -m lit_rl`."""
    debug = "--debug" in sys.argv
    arguments = [a for a in (sys.argv[1:] if args is None else args) if a != "--debug"]
    first = arguments[0] if arguments else None
    if first in ("-h", "--help"):
        print(help_text())
    elif first == "--version":
        print(f"lit-rl {lit_rl.__version__}")
    else:
        quieten()
        import_from_folder()
        try:
            _run(first, arguments)
        except Exception as error:
            if debug:
                raise
            if isinstance(error, LitRLError):
                end(str(error), 2 if isinstance(error, OptionError) else 1)
            from lit_rl.cli.messages import fail

            fail(error, arguments)


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


def _run(first: str | None, arguments: Sequence[str]) -> None:
    if first in OWN:
        getattr(importlib.import_module(f"lit_rl.cli.{first}"), first)(arguments[1:])
        return
    if not set(SUBCOMMANDS) & set(arguments):
        close = difflib.get_close_matches(first or "", SUBCOMMANDS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        given = " is missing" if first is None else f"={first!r}"
        raise OptionError(f"subcommand{given}: expected one of {', '.join(SUBCOMMANDS)}.{hint}")
    if "lightning" not in sys.modules:
        print(f"lit-rl {lit_rl.__version__}: loading PyTorch and Lightning ...", file=sys.stderr, flush=True)
    from lit_rl.cli import program

    program.run(arguments)


__all__ = ["main"]
