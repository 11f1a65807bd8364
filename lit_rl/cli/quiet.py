"""What the command line leaves out of what others print."""

import logging
import sys
import warnings


def quieten() -> None:
    """Leave out what Lightning says to everybody and what does not apply here; a warning is one line."""
    warnings.formatwarning = lambda message, *_, **__: f"{' '.join(str(message).split())}\n"
    for message in (
        ".*isinstance.treespec, LeafSpec.*",
        ".*LightningCLI's args parameter is intended to run from within Python.*",
        ".*The dirpath has changed from.*",  # a resumed run logs to a folder of its own
        ".*Couldn't infer the batch indices.*",  # an episode is no batch of a data set
    ):
        warnings.filterwarnings("ignore", message=message)
    advice = ("litlogger", "litmodels", "`weights_only` was not set", "TPU available: False")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.trainer.connectors.checkpoint_connector"):
        logging.getLogger(name).addFilter(lambda record: not any(words in record.getMessage() for words in advice))
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).handlers = [_Printed()]


class _Printed(logging.Handler):
    """What Lightning tells goes to stdout (it has it on stderr); warnings and errors stay on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stdout if record.levelno < logging.WARNING else sys.stderr)
