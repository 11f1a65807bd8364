"""The command line: `lit-rl` and `python -m lit_rl`.

PyTorch and Lightning take seconds to import: nothing here does, nor do the library's own commands before they have read
their options, so that help is there at once.
"""

import importlib
import sys
from collections.abc import Sequence

import lit_rl
from lit_rl.cli.quiet import quieten
from lit_rl.cli.shared import OWN, SUBCOMMANDS, end, help_text, import_from_folder
from lit_rl.errors import LitRLError, OptionError, did_you_mean


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


def _run(first: str | None, arguments: Sequence[str]) -> None:
    if first in OWN:
        getattr(importlib.import_module(f"lit_rl.cli.{first}"), first)(arguments[1:])
        return
    if not set(SUBCOMMANDS) & set(arguments):
        given = " is missing" if first is None else f"={first!r}"
        raise OptionError(
            f"subcommand{given}: expected one of {', '.join(SUBCOMMANDS)}.{did_you_mean(first or '', SUBCOMMANDS)}"
        )
    if "lightning" not in sys.modules:
        print(f"lit-rl {lit_rl.__version__}: loading PyTorch and Lightning ...", file=sys.stderr, flush=True)
    from lit_rl.cli import program

    program.run(arguments)


__all__ = ["main"]
