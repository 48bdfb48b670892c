"""Child processes that end with the process that started them, and time limits for them."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


def end_with_parent(signal_number: int = signal.SIGTERM, parent: int | None = None) -> None:
    """Have this process sent a signal when the thread that started it ends. Does nothing but on Linux.

    Args:
        signal_number: the signal.
        parent: the number of the process that started this one. If it has ended already, this process exits with 1.
    """
    if sys.platform != "linux":
        return
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal_number)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def bound_to_parent(command: Sequence[str], signal_number: int = signal.SIGTERM) -> list[str]:
    """Return a command that calls `end_with_parent` and then becomes `command`, for a child of this process.

    `preexec_fn` could do this too, but makes subprocess fork instead of vfork. A forked Python clears what its other
    threads held. After trainings in this process DTensor's cache of a thread may hold the last reference to a group of
    gloo, whose destructor joins threads that a fork does not copy: a segmentation fault before the command starts.
    """
    return [sys.executable, "-I", "-S", __file__, str(int(signal_number)), str(os.getpid()), *command]


class Deadline:
    """Kill a process, which leads a group, with its group if this context lasts longer than `seconds`."""

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
    """Kill a process, which leads a group, with its group, and reap it. If it has ended, its group is left alone."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def ending(process: subprocess.Popen[Any]) -> str:
    """Wait for a process and return how it ended, for a message."""
    code = process.wait()
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def identity(pid: int) -> str:
    """Return a name for a process that no other one ever has: `HOST:BOOT:NAMESPACE:PID:START`.

    A process number alone is used again, also after the machine was started again, and in each container.

    Raises:
        OSError: there is no process of this number, or this is not Linux.
    """
    namespace = os.readlink("/proc/self/ns/pid").strip("pid:[]")
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()}:{boot}:{namespace}:{pid}:{_state_and_start(pid)[1]}"


def is_running(name: str) -> bool | None:
    """Return whether the process with this `identity` runs; None if that cannot be seen from here."""
    place, _, process = name.rpartition(":")[0].rpartition(":")
    start = name.rpartition(":")[2]
    try:
        host, boot, namespace, _, _ = identity(os.getpid()).split(":")
    except OSError:
        return None
    if place.startswith(f"{host}:") and place.count(":") == 2 and place.split(":")[1] != boot:
        return False  # the machine was started again since
    if place != f"{host}:{boot}:{namespace}" or not process.isdecimal():
        return None
    try:
        state, began = _state_and_start(int(process))
    except OSError:
        return False
    return began == start and state not in "ZX"


def _state_and_start(pid: int) -> tuple[str, str]:
    """Return a process's state, such as R or Z, and the time at which it began, in ticks since the boot."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], fields[19]


if __name__ == "__main__":  # as `bound_to_parent` starts it
    end_with_parent(int(sys.argv[1]), int(sys.argv[2]))
    os.execvp(sys.argv[3], sys.argv[3:])  # noqa: S606  the signal at the parent's end outlives an exec
