"""What Lightning says to everybody and what does not apply here."""

import logging
import warnings

ADVICE = ("litlogger", "litmodels", "`weights_only` was not set", "TPU available: False")
LOGGERS = ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.trainer.connectors.checkpoint_connector")
WARNINGS = (
    ".*isinstance.treespec, LeafSpec.*",
    ".*The dirpath has changed from.*",  # a resumed run logs to a folder of its own
    ".*Total length of `list` across ranks is zero.*",  # nothing is evaluated, where there is nothing to evaluate by
    ".*Couldn't infer the batch indices.*",  # an episode is no batch of a data set
)


def leave_out_noise() -> None:
    """Leave out adverts, and warnings that no user of lit_rl can mend. More than once is as good as once."""
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in LOGGERS:
        logger = logging.getLogger(name)
        if _is_news not in logger.filters:
            logger.addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not any(words in record.getMessage() for words in ADVICE)
