"""ffmpeg from just before the first frame on: for clips deep in long files that decord gets wrong."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pusa.video.decoders import with_ffmpeg
from pusa.video.fit import Placement
from pusa.video.survey import SMALL

LEAD = 1.0  # seconds: containers that seek by the time of decoding land later than asked for


def read(
    path: Path,
    frames: Sequence[int],
    seconds: float,
    placement: Placement | None = None,
    start_time: float | None = None,
) -> np.ndarray:
    """As `with_ffmpeg.read`, of files in which ffmpeg was seen to find the frame of this time.

    Args:
        path: the file.
        frames: indices in the order of time, each once.
        seconds: time it may take.
        placement: None leaves them as they are decoded.
        start_time: seconds, of the first of these frames, as the survey tells it; None reads from the start.

    Returns:
        (T, H, W, 3) uint8.

    Raises:
        Rejected: UNREADABLE, DAMAGED, TIMEOUT, CRASHED.
    """
    if start_time is None:
        return with_ffmpeg.read(path, frames, seconds, placement)
    return with_ffmpeg.take(path, frames, seconds, placement, _from(start_time, frames), _seek(start_time))


def glance(path: Path, frames: Sequence[int], seconds: float, start_time: float) -> np.ndarray:
    """Thumbnails (T, 8, 8, 3) of what `read` gives, made as the survey's are.

    Raises:
        Rejected: as `read`.
    """
    filters = f"{_from(start_time, frames)},{SMALL}"
    return with_ffmpeg.take(path, frames, seconds, None, filters, _seek(start_time))


def _seek(start_time: float) -> tuple[str, ...]:
    """Times stay those of the survey: without `copyts` they would count from where it landed."""
    return "-ss", f"{max(0.0, start_time - LEAD):.6f}", "-noaccurate_seek", "-copyts", "-start_at_zero"


def _from(start_time: float, frames: Sequence[int]) -> str:
    """From the frame of exactly this time on; where there is none, nothing."""
    first = f"eq(pts,{round(start_time * 1e6)})"
    return f"settb=AVTB,select='{first}+gt(selected_n,0)',trim=end_frame={frames[-1] - frames[0] + 1}"
