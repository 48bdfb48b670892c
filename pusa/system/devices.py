"""The GPUs of this machine: which of them are visible, and the lock that keeps two processes from using one at once."""

import fcntl
import logging
import os
import re
import stat
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pusa.errors import StageError
from pusa.system.locks import holder_of, note_holder, open_lock, try_lock

log = logging.getLogger(__name__)
VISIBLE = "CUDA_VISIBLE_DEVICES"
_held: list[IO[str]] = []  # for the life of this process


@dataclass(frozen=True)
class Device:
    """A GPU: its entry of CUDA_VISIBLE_DEVICES, and its UUID; None: torch knows it, in a process that sees only it."""

    visible: str
    uuid: str | None = None


def visible_gpus() -> list[Device]:
    """Return the GPUs that this process may use. CUDA is not started, which would take memory of one of them."""
    import torch

    count = torch.cuda.device_count()
    entries = [entry for word in os.environ.get(VISIBLE, "").split(",") if (entry := word.strip())]
    return [Device(entry) for entry in (entries or map(str, range(count)))][:count]


def hold_device(device: Device | None, emit: Callable[[Any], None] = lambda event: None) -> None:
    """Take the lock of a GPU, and hold it for the life of this process. Wait while another of this user has it.

    Raises:
        StageError: the folder of the locks is somebody else's, or cannot lock.
    """
    if device is None:
        return
    uuid = device.uuid or _uuid()
    folder = Path(tempfile.gettempdir()) / f"pusa-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise StageError(
            f"{folder} is not a folder that only this user can enter; the locks of GPUs are there: move it"
        )
    lock = open_lock(folder / f"{re.sub(r'[^A-Za-z0-9-]', '-', uuid)}.lock")
    if not try_lock(lock, fcntl.LOCK_EX, wait=False):
        log.info("waiting for %s, which uses GPU %s (%s)", holder_of(lock), device.visible, uuid)
        try_lock(lock, fcntl.LOCK_EX, wait=True)
    note_holder(lock)
    _held.append(lock)


def _uuid() -> str:
    """Return the UUID of the only GPU that this process sees: containers number GPUs in their own ways."""
    import torch

    return f"GPU-{torch.cuda.get_device_properties(0).uuid}"
