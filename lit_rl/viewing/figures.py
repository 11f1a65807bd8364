"""What pictures of matplotlib have in common."""

from pathlib import Path
from typing import Any

from lit_rl.errors import OptionError, write_error


def save_figure(figure: Any, output: str | Path) -> None:
    """Write a picture, into a folder that is made if it is missing.

    Raises:
        OptionError: if it cannot be written.
    """
    try:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=130)
    except OSError as error:
        raise OptionError(
            f"output={str(output)!r} cannot be written: {write_error(error)}. Give another file."
        ) from error
