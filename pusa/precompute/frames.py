"""The frames of clips as they were ingested, decoded while the clips before them are encoded."""

import functools
import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from pusa.errors import Reason, Rejected
from pusa.system.files import sha256_file
from pusa.system.threads import DaemonThreadPool
from pusa.video.decoders import read_clip
from pusa.video.ffmpeg import open_regular_file
from pusa.video.fit import Placement

Clip = Mapping[str, Any]  # a row of the clips table, or of a catalogue
Frames = Future[np.ndarray]


def read_ahead(
    pool: DaemonThreadPool, clips: Mapping[str, Clip], batch_size: int, seconds: float
) -> Iterator[dict[str, Frames]]:
    """Batches of clips by key, each clip's frames (T, H, W, 3) uint8 or why there are none (`Rejected`) in a future.

    Args:
        pool: of threads that decode; each has a decoder's process of its own.
        clips: by key.
        batch_size: how many are handed out at a time; one batch more is decoded meanwhile.
        seconds: allowed for decoding one clip.
    """
    keys = list(clips)
    ahead: deque[dict[str, Frames]] = deque()
    for start in range(0, len(keys), batch_size):
        batch = keys[start : start + batch_size]
        ahead.append({key: pool.submit(frames_of, clips[key], seconds) for key in batch})
        if len(ahead) > 1:
            yield ahead.popleft()
    yield from ahead


def frames_of(clip: Clip, seconds: float) -> np.ndarray:
    """A clip's frames (T, H, W, 3) uint8.

    Raises:
        Rejected: the file is gone, is another one now, or cannot be decoded. An outage of the disk is none of these.
    """
    require_as_ingested(clip)
    place = placement_of(clip)
    return read_clip(
        Path(clip["source"]), clip["frames"], clip["decoder"], seconds, place, start_time=clip["start_time"]
    )


def require_as_ingested(clip: Clip) -> None:
    """Refuse a source that is not what it was.

    Raises:
        Rejected: the file is gone, the system refuses it, or it is another one now.
        OSError: the disk fails.
    """
    path = Path(clip["source"])
    if not os.path.lexists(path):
        raise Rejected(Reason.CHANGED, f"{path} is gone")
    with open_regular_file(path) as handle:
        stat = os.fstat(handle)
        if _hash(path, stat.st_ino, stat.st_size, stat.st_mtime_ns) != clip["source_sha256"]:
            raise Rejected(Reason.CHANGED, f"{path} is not the file that was ingested")


def placement_of(clip: Clip) -> Placement:
    """How a clip's frames got their size."""
    return Placement(clip["width"], clip["height"], clip["fit"], tuple(clip["box"]), clip["pixel_aspect"])


@functools.lru_cache(maxsize=1024)  # a source may have many clips
def _hash(path: Path, inode: int, size: int, mtime_ns: int) -> str:
    return sha256_file(path)
