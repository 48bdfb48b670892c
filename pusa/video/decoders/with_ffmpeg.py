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
from pusa.video.conversion import Conversion
from pusa.video.ffmpeg import find_error, run_ffmpeg
from pusa.video.fit import Collected, Placement, flatten

SEEK_LEAD = 1.0  # seconds: containers that seek by decoding time land later than requested
_PAM_HEADER = re.compile(rb"P7\nWIDTH (\d+)\nHEIGHT (\d+)\nDEPTH ([34])\nMAXVAL 255\nTUPLTYPE RGB(?:_ALPHA)?\nENDHDR\n")


def read(
    path: Path,
    frames: Sequence[int],
    seconds: float,
    placement: Placement | None = None,
    start_time: float | None = None,
    conversion: Conversion | None = None,
) -> np.ndarray:
    """Return frames, decoded from the start of the file; see `Decoder`. `start_time` is not used."""
    return _run(path, frames, seconds, placement, conversion, [_frames_by_number(frames)], _colours(conversion))


def read_seeking(
    path: Path,
    frames: Sequence[int],
    seconds: float,
    placement: Placement | None = None,
    start_time: float | None = None,
    conversion: Conversion | None = None,
) -> np.ndarray:
    """Return frames, decoded from shortly before `start_time` on; see `Decoder`. Without it, as `read`."""
    if start_time is None:
        return read(path, frames, seconds, placement, None, conversion)
    choose, options = [_frames_from(start_time, frames)], _seek_options(start_time)
    return _run(path, frames, seconds, placement, conversion, choose, _colours(conversion), options)


def read_thumbnails(
    path: Path, frames: Sequence[int], seconds: float, conversion: Conversion, start_time: float | None = None
) -> np.ndarray:
    """Return thumbnails (T, 8, 8, 3) as the survey makes them, of the frames of `read`, or of `read_seeking`.

    Raises:
        Rejected: UNREADABLE, DAMAGED, TIMEOUT, CRASHED.
    """
    choose = [_frames_by_number(frames) if start_time is None else _frames_from(start_time, frames)]
    options = () if start_time is None else _seek_options(start_time)
    return _run(path, frames, seconds, None, conversion, choose, conversion.thumbnail_filters(), options)


def _colours(conversion: Conversion | None) -> list[str]:
    return ["format=rgb24"] if conversion is None else conversion.colour_filters()


def _frames_by_number(frames: Sequence[int]) -> str:
    return f"trim=start_frame={frames[0]}:end_frame={frames[-1] + 1}"


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
    conversion: Conversion | None,
    choose: Sequence[str],
    convert: Sequence[str],
    options: Sequence[str] = (),
) -> np.ndarray:
    """Return `frames` from the output of ffmpeg.

    Args:
        path: the file.
        frames: as in `Decoder`.
        seconds: as in `Decoder`.
        placement: as in `Decoder`.
        conversion: as in `Decoder`.
        choose: filters that let through frames[0] and every frame after it.
        convert: filters for the frames that were let through.
        options: arguments before the input.
    """
    errors: list[str] = []
    collected = Collected(path, len(frames))
    selected = set(frames)
    filters = [*(conversion.first_filters() if conversion else ()), *choose, *convert]
    stream = f"0:{conversion.stream}" if conversion else "0:V:0"
    # Picture files, because each states its own size. Without the queue's size, ffmpeg keeps eight of them.
    output = ("-map", stream, "-vf", ",".join(filters), "-fps_mode", "passthrough", "-thread_queue_size", "1",
              "-f", "image2pipe", "-c:v", "pam", "-pix_fmt", conversion.pixel_format if conversion else "rgb24",
              "pipe:1")  # fmt: skip
    options = (*options, *(conversion.input_options if conversion else ()))
    background = conversion.background if conversion else "black"

    def on_log(line: str) -> None:
        if not errors and (error := find_error(line)):
            errors.append(error)

    with run_ffmpeg(path, output, seconds, on_log, options=options) as process:
        for index, picture in enumerate(_pam_pictures(cast(BinaryIO, process.stdout)), frames[0]):
            if index in selected:
                frame = flatten(picture, background)
                collected.add(frame if placement is None else placement.apply(frame))
    if collected.count != len(frames):
        count = f"{collected.count} of {len(frames)} frames in {frames[0]}..{frames[-1]} could be decoded"
        cause = f": {errors[0]}" if errors else ""
        raise Rejected(Reason.DAMAGED, f"{path}: {count}{cause}")
    return collected.frames


def _pam_pictures(stream: BinaryIO) -> Iterator[np.ndarray]:
    """Yield pictures (H, W, 3 or 4) of the PAM format until the stream ends or breaks off."""
    while match := _PAM_HEADER.fullmatch(b"".join(stream.readline() for _ in range(7))):
        width, height, depth = (int(number) for number in match.groups())
        pixels = stream.read(width * height * depth)
        if len(pixels) < width * height * depth:
            return
        yield np.frombuffer(pixels, np.uint8).reshape(height, width, depth)
