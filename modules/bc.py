"""Behaviour cloning."""

from typing import Any

from lit_rl.errors import OptionError
from lit_rl.modules.marwil import MARWIL
from lit_rl.options import NonNegative


class BC(MARWIL):
    """Behaviour cloning: the recorded actions' log-likelihood is maximised (Pomerleau 1988). `MARWIL` with `beta=0`.

    There is no critic. With memory (`network=LSTMNetwork`) it learns from sequences.

    Args:
        beta: 0; see `MARWIL`, whose options of weights and critic `BC` does not take either.
    """

    def __init__(self, *, beta: NonNegative = 0.0, **options: Any):
        super().__init__(beta=beta, **options)
        if beta:
            raise OptionError(f"beta={beta!r}: expected 0 with BC. Use MARWIL.")
