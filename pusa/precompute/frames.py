"""Decode the frames of clips, as they were ingested, while earlier clips are encoded."""

import functools
import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from pusa.errors import Reason, Rejected
from pusa.system.files import State, state_of
from pusa.system.threads import DaemonThreadPool
from pusa.video.conversion import Conversion
from pusa.video.decoders import read_clip
from pusa.video.ffmpeg import hash_regular_file, open_regular_file
from pusa.video.fit import Placement

ClipRow = Mapping[str, Any]  # a row of a clips table, or of the catalogue of a latents table
Frames = Future[np.ndarray]


def decode_ahead(
    pool: DaemonThreadPool, clips: Mapping[str, ClipRow], batch_size: int, seconds: float
) -> Iterator[dict[str, Frames]]:
    """Yield batches of clips by key; each future holds frames (T, H, W, 3) uint8, or raises `Rejected`.

    Args:
        pool: the threads that decode; each has its own decoder process.
        clips: the clips by key.
        batch_size: the number of clips in a batch; while one batch is used, the next one is decoded.
        seconds: the time limit for decoding one clip.
    """
    keys = list(clips)
    ahead: deque[dict[str, Frames]] = deque()
    for start in range(0, len(keys), batch_size):
        batch = keys[start : start + batch_size]
        ahead.append({key: pool.submit(decode_clip, clips[key], seconds) for key in batch})
        if len(ahead) > 1:
            yield ahead.popleft()
    yield from ahead


def decode_clip(clip: ClipRow, seconds: float) -> np.ndarray:
    """Return a clip's frames (T, H, W, 3) uint8. The source is checked before and after it is read.

    Raises:
        Rejected: the file is gone, has changed, or cannot be decoded.
        OSError: no file can be opened, because too many are open.
    """
    check_source_unchanged(clip)
    path, place, conversion = Path(clip["source"]), placement_of(clip), Conversion.of_row(clip)
    frames = read_clip(path, clip["frames"], clip["decoder"], seconds, place, clip["start_time"], conversion)
    check_source_unchanged(clip)
    return frames


def check_source_unchanged(clip: ClipRow) -> None:
    """Check that a clip's source is the file that was ingested.

    Its bytes are compared, once for each state of the file: a copy may keep the size and the time of another file.

    Raises:
        Rejected: the file is gone, cannot be opened, or has changed.
        OSError: no file can be opened, because too many are open.
    """
    path = Path(clip["source"])
    if not os.path.lexists(path):
        raise Rejected(Reason.CHANGED, f"{path} is gone")
    with open_regular_file(path) as handle:
        state = state_of(handle)
    if _hash(path, state) != clip["source_sha256"]:
        raise Rejected(Reason.CHANGED, f"{path} is not the file that was ingested")


def placement_of(clip: ClipRow) -> Placement:
    """Return how a clip's frames are cut and fitted."""
    box = tuple(clip["box"])
    return Placement(clip["width"], clip["height"], clip["fit"], box, clip["pixel_aspect"], clip["background"])


@functools.lru_cache(maxsize=1024)  # a source may have many clips
def _hash(path: Path, state: State) -> str:
    """Return the SHA-256 of a file in this state.

    Raises:
        Rejected: it is in another state by now, or cannot be read.
    """
    sha256 = hash_regular_file(path)
    with open_regular_file(path) as handle:
        if state_of(handle) != state:
            raise Rejected(Reason.CHANGED, f"{path} was changed while it was read")
    return sha256
