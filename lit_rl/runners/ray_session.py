"""Starting or joining Ray, without the side effects a learner process cannot have. The only module that starts Ray."""

import logging
import os
import signal
import stat
import sys
import threading
from pathlib import Path

from lit_rl.errors import RunnerError


def connect(address: str | None = None) -> str:
    """Start Ray on this machine, or join a running one; returns the address at which other processes can join.

    Args:
        address: of a running Ray. None: `RAY_ADDRESS`, else this process's own Ray, else a new local one (no
            dashboard, token authentication, log of the actors to this process's output).

    Raises:
        RunnerError: if `address` cannot be joined.
    """
    # Ray turns authentication on for a Ray it starts. Who joins that one needs the same mode, set before `import ray`;
    # set later it only reaches the processes that Ray starts, which would then refuse this one. `ray start` turns it on
    # where there is a token, and so where there is none, the Ray to be joined has it off.
    address = address or os.environ.get("RAY_ADDRESS")
    if "ray" not in sys.modules and (not address or _has_token()):
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if not ray.is_initialized():
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            if address:
                ray.init(address=address, logging_level=logging.WARNING)
            else:
                ray.init(address="local", include_dashboard=False, logging_level=logging.WARNING)
                _protect_token()
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            message = " ".join(str(error).split())
            raise RunnerError(
                f"ray_address={address!r}: cannot {'join' if address else 'start'} Ray: {message}"
            ) from error
        finally:
            # ray.init replaces the SIGTERM handler: Lightning's step would be cut in the middle.
            for number, handler in handlers.items():
                if handler is not None and threading.current_thread() is threading.main_thread():
                    signal.signal(number, handler)
    return ray.get_runtime_context().gcs_address


def _has_token() -> bool:
    return bool({"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ)) or _token().exists()


def _token() -> Path:
    return Path.home() / ".ray" / "auth_token"


def _protect_token() -> None:
    """Ray writes its authentication token readable by all users of the machine."""
    if _token().exists():
        _token().chmod(stat.S_IRUSR | stat.S_IWUSR)
