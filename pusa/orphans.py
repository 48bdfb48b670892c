"""Child processes that end with the one that started them, however it ends."""

import ctypes
import os
import signal
import sys

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
