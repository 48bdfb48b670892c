"""Frames of a clip's source, for whoever looks at the clip after it was cut."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from pusa.data.schema import Reason
from pusa.decoding import DECODERS
from pusa.decoding.read import read_clip
from pusa.errors import Rejected
from pusa.manifest import Limits
from pusa.precomputing.frames import placement_of, require_as_ingested


def read_source(clip: Mapping[str, Any], frames: Sequence[int], fitted: bool = False) -> np.ndarray:
    """Frames (T, H, W, 3) uint8 of a row's source: whole and upright, or cut and fitted as the clip is.

    Raises:
        Rejected: the source is gone, has changed since, or cannot be decoded.
    """
    path = Path(clip["source"])
    if clip["decoder"] == "none":
        raise Rejected(Reason.NOT_A_VIDEO, "it was imported, and knows of no video")
    if clip["decoder"] not in DECODERS:
        raise Rejected(Reason.NOT_A_VIDEO, f"{path} is read by {clip['decoder']!r}; known are {', '.join(DECODERS)}")
    try:
        require_as_ingested(clip)
    except OSError as error:
        raise Rejected(Reason.UNREADABLE, f"{path} cannot be read: {error.strerror or error}") from error
    placement = placement_of(clip) if fitted else None
    start = clip["start_time"] if min(frames) == min(clip["frames"]) else None
    seconds = Limits().decoding_seconds
    if list(frames) == list(clip["frames"]):
        return read_clip(path, frames, clip["decoder"], seconds, placement, start)
    if clip["decoder"] != "ffmpeg" and start is not None:
        with suppress(Rejected):  # it gives the frames from that time on, or nothing
            return read_clip(path, frames, "ffmpeg_seek", seconds, placement, start)
    return read_clip(path, frames, "ffmpeg", seconds, placement)  # the clip's decoder is right for its frames alone
