"""The command line: `lit-rl` and `python -m lit_rl`."""

import os
import sys
import warnings
from collections.abc import Sequence

import lit_rl
from lit_rl.cli import commands


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of `lit-rl` and `python -m lit_rl`."""
    given = sys.argv[1:] if args is None else list(args)
    arguments = [argument for argument in given if argument != "--debug"]
    import_from_folder()
    try:
        if arguments == ["--version"]:
            print(f"lit-rl {lit_rl.__version__}")
        elif arguments and arguments[0] in commands.COMMANDS:
            one_line_warnings()
            commands.run(arguments)
        else:
            from lit_rl.cli import program

            program.main(arguments)
    except Exception as error:
        if "--debug" in given:
            raise
        from lit_rl.cli.program import fail

        fail(error, arguments)


def one_line_warnings() -> None:
    """A warning is its sentence alone."""
    warnings.formatwarning = lambda message, *_, **__: f"{' '.join(str(message).split())}\n"


def import_from_folder() -> None:
    """Find modules in the working folder, as `python -m lit_rl` does: environments and networks of one's own."""
    folder = os.getcwd()
    if not sys.flags.safe_path and not {"", folder} & set(sys.path):
        sys.path.insert(0, folder)


__all__ = ["main"]
