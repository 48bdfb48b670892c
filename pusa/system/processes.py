"""Child processes that end with the one that started them, however it ends."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from typing import Any, Self

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_LIBC = ctypes.CDLL(None)


def end_with_parent(signal_number: int = signal.SIGTERM, parent: int | None = None) -> None:
    """Have this process sent a signal when the thread that started it ends. Linux only.

    Args:
        signal_number: which signal.
        parent: the process that started it, to see whether it ended before this call.
    """
    if sys.platform != "linux":
        return
    _LIBC.prctl(_DIE_WITH_PARENT, signal_number)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


class Deadline:
    """While this context lasts, a process that leads a group is killed with its group after `seconds`."""

    def __init__(self, process: subprocess.Popen[Any], seconds: float) -> None:
        self.passed = False
        self._process = process
        self._timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), self._pass)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._timer.cancel()
        self._timer.join()  # from here on `passed` is final

    def _pass(self) -> None:
        if self._process.poll() is None:
            self.passed = True
            kill(self._process)


def kill(process: subprocess.Popen[Any]) -> None:
    """End a process that leads a group, with its group, and reap it. One that has ended already is left alone."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def ending(process: subprocess.Popen[Any]) -> str:
    """How a process ended, for a message."""
    code = process.wait()
    return f"signal {-code}" if code < 0 else f"exit code {code}"
