"""Mistakes a user can mend. The command line prints their message alone; anything else keeps its traceback."""

import difflib
import traceback
from collections.abc import Iterable


class LitRLError(Exception):
    """Base of every error whose message says what was given, what was expected and what to do."""


class OptionError(LitRLError, ValueError):
    """An option has a value it cannot have."""


class SpaceError(LitRLError, TypeError):
    """An observation or action space is not supported by what was asked to handle it."""


class EnvError(LitRLError, RuntimeError):
    """An environment could not be made, or gave something it must not give."""


class EnvFailure(EnvError):
    """What an environment's own code raised: another try may go well."""


def env_error(env_id: str, what: str, error: Exception) -> Exception:
    """What an environment raised, as one sentence that names it; an error that already is one, unchanged."""
    if isinstance(error, LitRLError):
        return error
    message = " ".join(str(error).split())
    if not message:  # a bare assert: its source line is what there is to read
        frames = traceback.extract_tb(error.__traceback__)
        message = (frames[-1].line if frames else "") or "no message"
    return EnvFailure(f"env={env_id} {what}: {type(error).__name__}: {message}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence, after a space, with the name that may be meant; "" if none is like it."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def sentence(error: Exception) -> str:
    """What an error says, with a full stop."""
    text = str(error)
    return text if text.endswith((".", "!", "?")) else f"{text}."


def write_error(error: Exception) -> str:
    """Why a file could not be written, in one line; what torch's zip writer says once the disk is full hides it."""
    cause = error.__context__ if isinstance(error.__context__, OSError) else error
    return " ".join(str(cause).split())[:200]


class RunnerError(LitRLError, RuntimeError):
    """An env runner could not be kept alive."""


class ReplayError(LitRLError, RuntimeError):
    """A replay buffer cannot grow, be drawn from, or be loaded."""


class DivergedError(LitRLError, RuntimeError):
    """A loss or a gradient is not a finite number any more."""


class CheckpointError(LitRLError, RuntimeError):
    """A checkpoint cannot be written or read."""


class DataError(LitRLError, RuntimeError):
    """Recorded episodes cannot be written or read."""
