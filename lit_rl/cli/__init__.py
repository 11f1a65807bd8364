"""The command line: `lit-rl` and `python -m lit_rl`."""

import sys
from collections.abc import Sequence


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of `lit-rl` and `python -m lit_rl`."""
    arguments = sys.argv[1:] if args is None else list(args)
    if arguments[:1] == ["data"] and "--debug" not in arguments:  # without Lightning, which takes seconds to import
        from lit_rl.cli.data import data

        try:
            data(arguments[1:])
        except Exception as error:
            from lit_rl.cli.program import fail

            fail(error, arguments)
        return
    from lit_rl.cli import program

    program.main(args)


__all__ = ["main"]
