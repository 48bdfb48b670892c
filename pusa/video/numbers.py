"""Measure a video file with the filters of ffmpeg, in one pass: detail, motion, and black and frozen stretches."""

import logging
import math
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import imageio_ffmpeg

from pusa.errors import MediaError
from pusa.video.ffmpeg import METADATA_PIPE, run_ffmpeg

log = logging.getLogger(__name__)
STILL = 4  # frames in a row that stand still, at least, are a frozen stretch
SECONDS = 600.0  # after which a measurement is given up
_FRAME = re.compile(r"frame:(\d+) ")
_VALUE = re.compile(r"lavfi\.([a-z_.]+)=(\S+)")


@dataclass
class FilterOutput:
    """What the filters print about each frame of a file with `frames` frames."""

    frames: int
    values: dict[str, list[float]] = field(default_factory=dict)  # by key, one for each frame
    black: list[list[int]] = field(default_factory=list)
    frozen: list[list[int]] = field(default_factory=list)
    _frame: int = -1

    @property
    def seen(self) -> int:
        """Return the number of frames that were printed."""
        return self._frame + 1

    def read(self, line: str) -> None:
        """Read a line: "frame:12 pts:..." or "lavfi.siti.si=65.50".

        A stretch has its last frame when it ends, or else when the video does.
        """
        if match := _FRAME.match(line):
            self._frame = int(match[1])
        elif match := _VALUE.match(line):
            key, last = match[1], self.frames - 1
            if key == "black_start":
                self.black.append([self._frame, last])
            elif key == "black_end":
                self.black[-1][1] = self._frame - 1
            elif key == "freezedetect.freeze_start":  # which is known `STILL` frames later
                self.frozen.append([self._frame - STILL, last])
            elif key == "freezedetect.freeze_end":
                self.frozen[-1][1] = self._frame - 1
            elif self._frame < self.frames:
                self.values.setdefault(key, []).append(float(match[2]))

    def numbers(self, filters: frozenset[str]) -> Iterator[tuple[str, Any]]:
        """Yield the name and value of each number that these filters measure."""
        changes = "vmafmotion.score", "siti.ti"  # the first frame has no change
        known = {key: values[key in changes :] for key, values in self.values.items()}
        if motion := known.get("vmafmotion.score"):
            yield "vmaf_motion", round(sum(motion) / len(motion), 4)
        for name, key in (("spatial_information", "siti.si"), ("temporal_information", "siti.ti")):
            if values := known.get(key):
                yield name, max(values)
        for name, stretches, by in (("black", self.black, "blackdetect"), ("frozen", self.frozen, "freezedetect")):
            if by in filters and (name == "black" or self.frames >= STILL):
                yield f"{name}_frames", float(sum(last - first + 1 for first, last in stretches))
                if stretches:
                    yield name, stretches


def measure_file(path: Path, frames: int, fps: float) -> dict[str, Any]:
    """Return the numbers of a video that only its file is needed for; those whose filter ffmpeg lacks are left out.

    `vmaf_motion` is the mean over all frames but the first of ffmpeg's `vmafmotion`. `spatial_information` and
    `temporal_information` are the largest of `siti`, as ITU-T P.910 has them. `black` and `frozen` are the stretches
    [first frame, last frame] of `blackdetect` and `freezedetect`, whose thresholds are used; `frozen` ones have
    `STILL` frames or more. `black_frames` and `frozen_frames` count their frames. What a video is too short for is
    left out.

    Args:
        path: the file.
        frames: how many it has.
        fps: its constant frame rate.

    Raises:
        MediaError: it cannot be read to its end in `SECONDS`, or ffmpeg failed.
    """
    duration = float((STILL - Fraction(1, 2)) / Fraction(fps).limit_denominator())
    arguments = {"blackdetect": "=d=0", "freezedetect": f"=d={duration:.6f}", "siti": "", "vmafmotion": ""}
    filters = filters_of(frozenset(arguments))
    if not filters:
        return {}
    # One more frame, which is white, ends a stretch that lasts to the end.
    chain = ["tpad=stop=1:color=white", *(f"{name}{arguments[name]}" for name in sorted(filters))]
    chain += ["metadata=mode=add:key=seen:value=1", f"metadata=mode=print:file={METADATA_PIPE}:direct=1"]
    output = ("-map", "0:v:0", "-vf", ",".join(chain), "-fps_mode", "passthrough", "-f", "null", "-")
    printed, messages = FilterOutput(frames), list[str]()
    with run_ffmpeg(path, output, SECONDS, messages.append, printed.read, level="error") as process:
        pass
    if process.returncode or printed.seen != frames + 1:
        cause = messages[0] if messages else f"it showed {printed.seen - 1} of {frames} frames"
        raise MediaError(f"{path} could not be measured; ffmpeg: {cause}")
    numbers = dict(printed.numbers(filters))
    return {name: value for name, value in numbers.items() if not isinstance(value, float) or math.isfinite(value)}


@lru_cache
def filters_of(names: frozenset[str]) -> frozenset[str]:
    """Return which of these filters ffmpeg has. The others are logged, once in a process."""
    program = imageio_ffmpeg.get_ffmpeg_exe()
    command = [program, "-hide_banner", "-filters"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)  # noqa: S603
    here = names & {line.split()[1] for line in listed.stdout.splitlines() if len(line.split()) > 1}
    if missing := sorted(names - here):
        log.warning("%s lacks the filters %s: videos have no numbers of them", program, ", ".join(missing))
    return here
