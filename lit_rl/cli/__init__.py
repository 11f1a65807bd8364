"""The command line: `lit-rl` and `python -m lit_rl`."""

from lit_rl.cli.program import main

__all__ = ["main"]
