"""Decode with ffmpeg, either from the first frame of the file on (slow, always right), or after a seek.

Seeking saves time for clips deep in long files that decord reads wrong. It is chosen only for clips in which it was
seen to find the frame of the start time; see `choice`.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from pusa.errors import Reason, Rejected
from pusa.video.ffmpeg import find_error, run_ffmpeg
from pusa.video.fit import Placement
from pusa.video.survey import THUMBNAIL_FILTERS

SEEK_LEAD = 1.0  # seconds: containers that seek by decoding time land later than requested
_PPM_HEADER = re.compile(rb"P6\n(\d+) (\d+)\n255\n")


def read(
    path: Path,
    frames: Sequence[int],
    seconds: float,
    placement: Placement | None = None,
    start_time: float | None = None,
) -> np.ndarray:
    """Return frames, decoded from the start of the file; see `Decoder`. `start_time` is not used."""
    return _run(path, frames, seconds, placement, f"trim=start_frame={frames[0]}:end_frame={frames[-1] + 1}")


def read_seeking(
    path: Path,
    frames: Sequence[int],
    seconds: float,
    placement: Placement | None = None,
    start_time: float | None = None,
) -> np.ndarray:
    """Return frames, decoded from shortly before `start_time` on; see `Decoder`. Without it, as `read`."""
    if start_time is None:
        return read(path, frames, seconds, placement)
    return _run(path, frames, seconds, placement, _frames_from(start_time, frames), _seek_options(start_time))


def read_thumbnails_seeking(path: Path, frames: Sequence[int], seconds: float, start_time: float) -> np.ndarray:
    """Return thumbnails (T, 8, 8, 3) of the frames of `read_seeking`, scaled as the survey's thumbnails are.

    Raises:
        Rejected: UNREADABLE, DAMAGED, TIMEOUT, CRASHED.
    """
    filters = f"{_frames_from(start_time, frames)},{THUMBNAIL_FILTERS}"
    return _run(path, frames, seconds, None, filters, _seek_options(start_time))


def _seek_options(start_time: float) -> tuple[str, ...]:
    # Without `copyts`, times would count from where the seek landed instead of from the start.
    return "-ss", f"{max(0.0, start_time - SEEK_LEAD):.6f}", "-noaccurate_seek", "-copyts", "-start_at_zero"


def _frames_from(start_time: float, frames: Sequence[int]) -> str:
    """Return filters that begin at the frame of exactly this time. If there is none, they let nothing through."""
    first = f"eq(pts,{round(start_time * 1e6)})"
    return f"settb=AVTB,select='{first}+gt(selected_n,0)',trim=end_frame={frames[-1] - frames[0] + 1}"


def _run(
    path: Path,
    frames: Sequence[int],
    seconds: float,
    placement: Placement | None,
    filters: str,
    options: Sequence[str] = (),
) -> np.ndarray:
    """Return `frames` from the output of ffmpeg, whose `filters` let through frames[0] and every frame after it."""
    errors: list[str] = []
    decoded: list[np.ndarray] = []
    selected = set(frames)
    # Picture files, because each states its own size.
    output = ("-map", "0:V:0", "-vf", filters, "-fps_mode", "passthrough",
              "-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "pipe:1")  # fmt: skip

    def on_log(line: str) -> None:
        if not errors and (error := find_error(line)):
            errors.append(error)

    with run_ffmpeg(path, output, seconds, on_log, options=options) as process:
        for index, frame in enumerate(_ppm_pictures(cast(BinaryIO, process.stdout)), frames[0]):
            if index in selected:
                decoded.append(frame if placement is None else placement.apply(frame))
    if len(decoded) != len(frames):
        count = f"{len(decoded)} of {len(frames)} frames in {frames[0]}..{frames[-1]} could be decoded"
        cause = f": {errors[0]}" if errors else ""
        raise Rejected(Reason.DAMAGED, f"{path}: {count}{cause}")
    return np.stack(decoded)


def _ppm_pictures(stream: BinaryIO) -> Iterator[np.ndarray]:
    """Yield pictures of the PPM format until the stream ends or breaks off."""
    while match := _PPM_HEADER.fullmatch(b"".join(stream.readline() for _ in range(3))):
        width, height = int(match[1]), int(match[2])
        pixels = stream.read(width * height * 3)
        if len(pixels) < width * height * 3:
            return
        yield np.frombuffer(pixels, np.uint8).reshape(height, width, 3)
