"""Decode the frames of a clip. To add a decoder: one file with a function like `Decoder`, and one line in `DECODERS`.

Files may be broken or hostile. Every decoder runs in a process of its own, with a time limit.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from pusa.registry import find
from pusa.video.conversion import Conversion
from pusa.video.fit import Placement

DECODERS = {  # name -> "module:function"
    "decord": "pusa.video.decoders.with_decord:read",
    "ffmpeg_seek": "pusa.video.decoders.with_ffmpeg:read_seeking",
    "ffmpeg": "pusa.video.decoders.with_ffmpeg:read",
}


class Decoder(Protocol):
    """The function that every decoder provides."""

    def __call__(
        self,
        path: Path,
        frames: Sequence[int],
        seconds: float,
        placement: Placement | None = None,
        start_time: float | None = None,
        conversion: Conversion | None = None,
    ) -> np.ndarray:
        """Return frames of a video.

        Args:
            path: the file.
            frames: increasing indices, without repetition, as the survey counts frames.
            seconds: time limit, after which the decoder is killed.
            placement: how frames are fitted; None returns them as they are decoded.
            start_time: time of the first of these frames in seconds, from the survey; None if unknown. Only a decoder
                that seeks by time needs it.
            conversion: how frames become sRGB; None reads the first stream, as its tags say. decord cannot convert,
                and is chosen only where nothing needs to be converted.

        Returns:
            (T, H, W, 3) uint8.

        Raises:
            Rejected: UNREADABLE, DAMAGED, TIMEOUT, CRASHED.
        """


def read_clip(
    path: Path,
    frames: Sequence[int],
    decoder: str,
    seconds: float,
    placement: Placement | None = None,
    start_time: float | None = None,
    conversion: Conversion | None = None,
) -> np.ndarray:
    """Return exactly these frames, read by the named decoder.

    Args:
        path: the file.
        frames: indices, as the survey counts frames. An index may be repeated; each frame is decoded once.
        decoder: a key of `DECODERS`.
        seconds: as in `Decoder`.
        placement: as in `Decoder`.
        start_time: as in `Decoder`; of the earliest frame.
        conversion: as in `Decoder`.

    Returns:
        (T, H, W, 3) uint8.

    Raises:
        ManifestError: the decoder is unknown.
        Rejected: UNREADABLE, DAMAGED, TIMEOUT, CRASHED.
    """
    read: Decoder = find(DECODERS, decoder, "decoder")
    distinct = sorted(set(map(int, frames)))
    decoded = read(path, distinct, seconds, placement, start_time, conversion)
    if distinct == list(frames):
        return decoded
    return decoded[np.searchsorted(distinct, frames)]
