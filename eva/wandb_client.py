"""W&B's client, the process wandb-core beside this one: it is never waited for longer than a limit.

The client itself waits for W&B's server for days. When it is killed, whatever waits for it in this process gets an
exception at once, so that one guard bounds every call; wandb starts a new client when it is next used.
"""

import atexit
import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.1
# What a client may take to leave that has nothing more to send.
LEAVE_SECONDS = 2.0


class _Guard(threading.Thread):
    """Kills the client once a deadline is over; it lives as long as the process, so that a call costs no thread."""

    def __init__(self) -> None:
        super().__init__(name="eva-wandb-guard", daemon=True)
        self.deadline = math.inf

    def run(self) -> None:
        while True:
            time.sleep(POLL_SECONDS)
            if time.monotonic() > self.deadline:
                kill()


_guard: _Guard | None = None


def _running_guard() -> _Guard:
    global _guard
    if _guard is None or not _guard.is_alive():  # none yet, or that of the process that this one was forked from
        _guard = _Guard()
        _guard.start()
        threading.excepthook = partial(_report, threading.excepthook)
    return _guard


def _report(usual: Callable[[Any], object], failure: threading.ExceptHookArgs) -> None:
    """Reports what a thread failed with, but not that wandb's could not tell a dead client what it may forget."""
    if failure.thread is None or failure.thread.name != "wandb-ServiceFinalizer":
        usual(failure)


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Kills the client if what is done meanwhile takes longer."""
    guard = _running_guard()
    before = guard.deadline
    guard.deadline = min(before, time.monotonic() + seconds)
    try:
        yield
    finally:
        guard.deadline = before


def clients(process: int) -> list[int]:
    """Returns the ids of a process's clients, as far as /proc tells of them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if words[0].endswith(b"wandb-core") and str(process).encode() in words[1:]:
                found.append(int(path.parent.name))
    return found


def is_gone() -> bool:
    """Tells whether this process has no client any more, where /proc tells of it."""
    return Path("/proc/self").exists() and not clients(os.getpid())


def kill() -> None:
    """Kills this process's client, whatever it has still to send."""
    for client in clients(os.getpid()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(client, signal.SIGKILL)


def end(seconds: float = LEAVE_SECONDS) -> None:
    """Makes the client leave, at last by force."""
    if "wandb" in sys.modules:
        import wandb

        with at_most(seconds), contextlib.suppress(Exception, SystemExit):  # a client that is gone, or was killed
            wandb.teardown()
        kill()


def end_at_exit() -> None:
    """Makes `end` the first that is done at this process's exit: wandb's own part there waits for the client for ever.

    The client must have been started before.
    """
    _running_guard()  # at exit no thread may be started
    atexit.unregister(end)
    atexit.register(end)


def setup() -> Any:
    """Makes wandb ready, with a client of this process's own, and returns its settings.

    wandb would take the client of whoever started this process (WANDB_SERVICE), which goes when that one goes.
    """
    import wandb

    if not clients(os.getpid()):
        os.environ.pop("WANDB_SERVICE", None)
    return wandb.setup().settings


def server() -> str:
    """Returns the address of W&B's server, as this machine's settings have it."""
    return str(setup().base_url)


def public_api(timeout: int | None = None) -> Any:
    """Returns W&B's public interface, whose answers may be waited for so many seconds, in a process that can exit."""
    import wandb

    setup()
    end_at_exit()
    return wandb.Api(timeout=timeout)
