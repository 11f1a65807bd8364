"""What the command line leaves out of what others print."""

import logging
import sys
import warnings

from lit_rl.quiet import leave_out_noise

LIGHTNING_LOGGERS = ("lightning.pytorch", "lightning.fabric")


def quieten() -> None:
    """As `leave_out_noise`; and a warning is one line, and what Lightning tells goes to stdout."""
    warnings.formatwarning = lambda message, *_, **__: f"{' '.join(str(message).split())}\n"
    warnings.filterwarnings("ignore", message=".*LightningCLI's args parameter is intended to run from within Python.*")
    leave_out_noise()
    for name in LIGHTNING_LOGGERS:
        logging.getLogger(name).handlers = [_Printed()]


class _Printed(logging.Handler):
    """What Lightning tells goes to stdout (it has it on stderr); warnings and errors stay on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stdout if record.levelno < logging.WARNING else sys.stderr)
