"""The GPUs of this machine: which of them are visible, and the lock that keeps two processes from using one at once."""

import fcntl
import logging
import math
import os
import re
import stat
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import IO, Any

from pusa.errors import StageError
from pusa.system.locks import SECONDS_BETWEEN_LOOKS, holder_of, note_holder, open_lock, try_lock

log = logging.getLogger(__name__)
VISIBLE = "CUDA_VISIBLE_DEVICES"
UUID = re.compile(r"GPU-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")  # an entry of it that needs no look at the GPU


@dataclass(frozen=True)
class Device:
    """A GPU: its entry of CUDA_VISIBLE_DEVICES, and its UUID, which identifies it; None: to be found out."""

    visible: str
    uuid: str | None = None


def visible_gpus() -> list[Device]:
    """Return the GPUs that this process may use. CUDA is not started, which would take memory of one of them."""
    import torch

    count = torch.cuda.device_count()
    entries = [entry for word in os.environ.get(VISIBLE, "").split(",") if (entry := word.strip())]
    return [Device(entry) for entry in (entries or map(str, range(count)))][:count]


def uuid_of(device: Device | None, emit: Callable[[Any], None]) -> str:
    """Return the UUID of a GPU, in the process that sees only it; "" without a GPU.

    Numbers identify no GPU: each container has its own.
    """
    if device is None:
        return ""
    if device.uuid:
        return device.uuid
    import torch

    return f"GPU-{torch.cuda.get_device_properties(0).uuid}"


def locks_folder() -> Path:
    """Return the folder with the locks of this user's GPUs. It may not exist."""
    return Path(tempfile.gettempdir()) / f"pusa-{os.getuid()}"


def lock_device(uuid: str, given_up: Event, seconds: float = math.inf) -> IO[str] | None:
    """Return the lock of a GPU, which is free again when it is closed; None if the wait was given up.

    Waits while another process of this user has it, for about `seconds` at most; the log says which.

    Raises:
        StageError: the folder of the locks is somebody else's, or cannot lock.
    """
    folder = locks_folder()
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise StageError(
            f"{folder} is not a folder that only this user can enter; the locks of GPUs are there: move it"
        )
    lock, reported = open_lock(folder / f"{re.sub(r'[^A-Za-z0-9-]', '-', uuid)}.lock"), False
    end = time.monotonic() + seconds
    while not try_lock(lock, fcntl.LOCK_EX, wait=False):
        if not reported:
            log.info("waiting for %s, which uses GPU %s", holder_of(lock), uuid)
        reported = True
        if given_up.wait(SECONDS_BETWEEN_LOOKS) or time.monotonic() > end:
            lock.close()
            return None
    note_holder(lock)
    return lock
