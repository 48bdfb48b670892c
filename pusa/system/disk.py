"""Pause the work while the disk that it writes to is nearly full, and continue by itself once there is room."""

import logging
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pusa.system.text import printable

log = logging.getLogger(__name__)
GIB = 2**30
POLL_SECONDS = 10.0
SECONDS_BETWEEN_WARNINGS = 300.0

Work = TypeVar("Work")


def free_bytes(folder: Path) -> int:
    """Return the bytes that are free for this user where a folder is or will be.

    Raises:
        OSError: the disk cannot be asked.
    """
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def shortage(folder: Path, min_free_gib: float) -> str:
    """Return what is free if it is less than a manifest's `min_free_gib`: "0.4 GiB free of 1 in FOLDER"; else ""."""
    try:
        free = free_bytes(folder) if min_free_gib else 0
    except OSError:  # the work itself will say what is wrong
        return ""
    if free >= min_free_gib * GIB:
        return ""
    return f"{free / GIB:.1f} GiB free of {min_free_gib:g} in {printable(folder)}"


class Room:
    """The free space that a stage needs, for all its threads.

    Args:
        folder: the folder that the stage writes.
        min_free_gib: what must be free there, in GiB; 0: nothing.
    """

    def __init__(self, folder: Path, min_free_gib: float) -> None:
        self._folder, self._min_free_gib = folder, min_free_gib
        self._warned, self._warning = -SECONDS_BETWEEN_WARNINGS, threading.Lock()

    def is_short(self) -> bool:
        """Return whether there is too little room; warn if so, at most every few minutes."""
        short = shortage(self._folder, self._min_free_gib)
        with self._warning:
            if short and time.monotonic() - self._warned >= SECONDS_BETWEEN_WARNINGS:
                self._warned = time.monotonic()
                log.warning("paused: %s; the work continues once there is room (min_free_gib)", short)
        return bool(short)

    def wait(self) -> None:
        """Return once there is room."""
        paused = False
        while self.is_short():
            paused = True
            self.rest()
        if paused:
            log.info("there is room again in %s: the work continues", self._folder)

    def rest(self) -> None:
        """Wait before the next look."""
        time.sleep(POLL_SECONDS)

    def before(self, take: Callable[[], Work | None]) -> Callable[[], Work | None]:
        """Return a function that takes work as `take` does, and gives it once there is room for its results."""

        def take_when_there_is_room() -> Work | None:
            if (work := take()) is not None:  # at the end of the work, nothing is waited for
                self.wait()
            return work

        return take_when_there_is_room
