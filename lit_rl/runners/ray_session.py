"""Starting or joining Ray, without the side effects a learner process cannot have. The only module that starts Ray."""

import contextlib
import logging
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from lit_rl.errors import RunnerError

_reapers: list[subprocess.Popen] = []
OWNER = "LIT_RL_RAY_OWNER"  # an environment variable
# What takes care of a Ray session after its owner: see `_end_with_this_process`. A process that is just starting has no
# environment to look at, so it looks until it has found nothing twice.
REAPER = """
import os, signal, sys, time
sys.stdin.read()
time.sleep(2)
looks = 0
while looks < 2:
    looks += 1
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                if sys.argv[1].encode() in file.read().split(bytes(1)):
                    os.kill(int(pid), signal.SIGKILL)
                    looks = 0
        except OSError:
            continue
    time.sleep(0.2)
"""


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
    # Signals are seen so soon while Ray is waited for, instead of once a second.
    os.environ.setdefault("RAY_get_check_signal_interval_milliseconds", "100")
    import ray

    if not ray.is_initialized():
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            if address:
                ray.init(address=address, logging_level=logging.WARNING)
            else:
                mark = f"{os.getpid()}-{time.time_ns()}"
                # Inherited by Ray's processes, and by no others. The second one keeps those that give themselves a
                # title (`setproctitle`) from writing it over their environment, and so over the first.
                with _environment({OWNER: mark, "SPT_NOENV": "1"}):
                    ray.init(address="local", include_dashboard=False, logging_level=logging.WARNING)
                _protect_token()
                _end_with_this_process(f"{OWNER}={mark}")
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


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables for the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _end_with_this_process(mark: str) -> None:
    """See to it that no process with `mark` in its environment outlives this one, however it ends.

    Ray's own agents stay for a minute after a `kill -9` of who started them, and its workers may.
    """
    reaper = subprocess.Popen(
        [sys.executable, "-IS", "-c", REAPER, mark],
        stdin=subprocess.PIPE,  # closed by the kernel when this process ends
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # a Ctrl-C is not for it
    )
    _reapers.append(reaper)  # whose input would be closed with the object


def _has_token() -> bool:
    return bool({"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ)) or _token().exists()


def _token() -> Path:
    return Path.home() / ".ray" / "auth_token"


def _protect_token() -> None:
    """Ray writes its authentication token readable by all users of the machine."""
    if _token().exists():
        _token().chmod(stat.S_IRUSR | stat.S_IWUSR)
