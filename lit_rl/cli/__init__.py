"""The command line: `lit-rl` and `python -m lit_rl`."""

import sys
from collections.abc import Sequence

import lit_rl
from lit_rl.cli import commands


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of `lit-rl` and `python -m lit_rl`."""
    given = sys.argv[1:] if args is None else list(args)
    arguments = [argument for argument in given if argument != "--debug"]
    try:
        if arguments == ["--version"]:
            print(f"lit-rl {lit_rl.__version__}")
        elif arguments and arguments[0] in commands.COMMANDS:
            commands.run(arguments)
        else:
            from lit_rl.cli import program

            program.main(arguments)
    except Exception as error:
        if "--debug" in given:
            raise
        from lit_rl.cli.program import fail

        fail(error, arguments)


__all__ = ["main"]
