"""ffmpeg: reads what decord cannot, from the first frame on."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from pusa.errors import Reason, Rejected
from pusa.video.ffmpeg import error_in, ffmpeg
from pusa.video.fit import Placement

_HEAD = re.compile(rb"P6\n(\d+) (\d+)\n255\n")


def read(
    path: Path,
    frames: Sequence[int],
    seconds: float,
    placement: Placement | None = None,
    start_time: float | None = None,
) -> np.ndarray:
    """Some frames, each as `placement` says.

    Args:
        path: the file.
        frames: indices in the order of time, each once.
        seconds: time it may take.
        placement: None leaves them as they are decoded.
        start_time: nothing that matters here.

    Returns:
        (T, H, W, 3) uint8.

    Raises:
        Rejected: UNREADABLE, DAMAGED, TIMEOUT, CRASHED.
    """
    return take(path, frames, seconds, placement, f"trim=start_frame={frames[0]}:end_frame={frames[-1] + 1}")


def take(
    path: Path,
    frames: Sequence[int],
    seconds: float,
    placement: Placement | None,
    filters: str,
    options: Sequence[str] = (),
) -> np.ndarray:
    """`read`, where these filters let through the first of the frames and those after it, one by one.

    Args:
        path: the file.
        frames: as `read`.
        seconds: as `read`.
        placement: as `read`.
        filters: ffmpeg's.
        options: what stands before the input on ffmpeg's command line.
    """
    errors: list[str] = []
    found: list[np.ndarray] = []
    wanted = set(frames)
    # A picture file for each frame says its own size.
    output = ("-map", "0:V:0", "-vf", filters, "-fps_mode", "passthrough",
              "-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "pipe:1")  # fmt: skip
    with ffmpeg(path, output, seconds, lambda line: _note(line, errors), options=options) as process:
        for index, frame in enumerate(_pictures(cast(BinaryIO, process.stdout)), frames[0]):
            if index in wanted:
                found.append(frame if placement is None else placement.apply(frame))
    if len(found) != len(frames):
        said = f": {errors[0]}" if errors else ""
        told = f"of frames {frames[0]}..{frames[-1]} {len(found)} of {len(frames)} could be decoded{said}"
        raise Rejected(Reason.DAMAGED, f"{path}: {told}")
    return np.stack(found)


def _note(line: str, errors: list[str]) -> None:
    if not errors and (error := error_in(line)):
        errors.append(error)


def _pictures(stream: BinaryIO) -> Iterator[np.ndarray]:
    """Pictures of the PPM format, one after the other, up to where the stream ends or breaks off."""
    while match := _HEAD.fullmatch(b"".join(stream.readline() for _ in range(3))):
        width, height = int(match[1]), int(match[2])
        pixels = stream.read(width * height * 3)
        if len(pixels) < width * height * 3:
            return
        yield np.frombuffer(pixels, np.uint8).reshape(height, width, 3)
