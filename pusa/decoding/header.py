"""What a video file says of itself, before anything of it is decoded for us."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from pusa.data.schema import Reason
from pusa.decoding.ffmpeg import error_in, ffmpeg
from pusa.decoding.opened import opened
from pusa.errors import Rejected

# Indented as nothing is that the file's author may write: tags are indented by more.
_STREAM = re.compile(r"\[info\] {3}Stream #0:\d+\S*: (\w+): (.*)")
_CONTAINER = re.compile(r"\[info\] Input #0, (\w+)")
_DURATION = re.compile(r"\[info\] {3}Duration: (\d+):(\d+):([\d.]+)")
_ROTATION = re.compile(r"\[info\] +Display Matrix: rotation of (-?[\d.]+) degrees")
_SIZE = re.compile(r", (\d{1,6})x(\d{1,6})\b")
_ASPECT = re.compile(r"\bSAR (\d+):(\d+)")
_DEEP = re.compile(r"(?:9|10|12|14|16|48|64)(?:le|be)\b")  # the end of a pixel format's name
_RATE = re.compile(r", ([\d.]+)(k?) (?:fps|tbr)\b")
NO_OUTPUT = "At least one output file must be specified"  # and none is wanted
NO_VIDEO = ("(attached pic)", "(timed thumbnails)")


@dataclass(frozen=True)
class Header:
    """The first video stream as it is to be shown: upright. Cover art is no video."""

    codec: str
    width: int
    height: int
    pixel_aspect: float  # width / height of a pixel
    fps: float | None
    rotation: int  # degrees, 0..359, against the clock
    duration: float | None  # seconds, of the longest stream
    container: str
    alone: bool  # no other stream is in the file, so `duration` is its own
    others: tuple[str, ...]  # codecs of the other streams
    deep: bool  # more than 8 bits a colour


def read_header(path: Path, seconds: float) -> Header:
    """What ffmpeg sees in a file, in `seconds` at most.

    Raises:
        Rejected: EMPTY_FILE, UNREADABLE, NOT_A_VIDEO, NO_VIDEO_STREAM, DAMAGED (the index is missing),
            TIMEOUT, CRASHED.
    """
    with opened(path) as handle:
        if os.fstat(handle).st_size == 0:
            raise Rejected(Reason.EMPTY_FILE, f"{path} is empty")
    notes = _Notes()
    with ffmpeg(path, (), seconds, notes.hear, level="info"):
        pass
    return notes.header(path)


@dataclass
class _Notes:
    """What is gathered line by line."""

    container: str = ""
    video: str = ""
    rotation: int = 0
    duration: float | None = None
    others: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    _in_video: bool = False

    def hear(self, line: str) -> None:
        if match := _STREAM.match(line):
            self._in_video = match[1] == "Video" and not self.video and not any(word in match[2] for word in NO_VIDEO)
            if self._in_video:
                self.video = match[2]
            else:
                self.others.append(match[2])
        elif match := _CONTAINER.match(line):
            self.container = match[1]
        elif match := _DURATION.match(line):
            self.duration = int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3])
        elif self._in_video and (match := _ROTATION.match(line)):
            self.rotation = round(float(match[1])) % 360
        elif (error := error_in(line)) and error != NO_OUTPUT:
            self.errors.append(error)

    def header(self, path: Path) -> Header:
        if not self.video:
            raise self._refusal(path)
        size = _SIZE.search(self.video)
        if size is None or self.video.startswith("none"):
            raise Rejected(Reason.NOT_A_VIDEO, f"{path} has a video stream that ffmpeg cannot decode: {self.video:.80}")
        width, height, aspect = int(size[1]), int(size[2]), _aspect(self.video)
        if self.rotation % 180 == 90:
            width, height, aspect = height, width, 1 / aspect
        return Header(
            codec=_names(self.video)[0],
            width=width,
            height=height,
            pixel_aspect=aspect,
            fps=_rate(self.video),
            rotation=self.rotation,
            duration=self.duration,
            deep=_DEEP.search(self.video) is not None,
            container=self.container,
            alone=not self.others,
            others=tuple(name for stream in self.others for name in _names(stream)),
        )

    def _refusal(self, path: Path) -> Rejected:
        if self.others:
            return Rejected(Reason.NO_VIDEO_STREAM, f"{path} has no video stream, but {self.others[0]:.80}")
        if "moov atom not found" in self.errors:  # it is an mp4, and the index comes last
            return Rejected(Reason.DAMAGED, f"{path} lacks its index; the end of the file may be missing")
        said = self.errors[0] if self.errors else "no stream is in it"
        return Rejected(Reason.NOT_A_VIDEO, f"{path} is no video that ffmpeg knows: {said}")


def _aspect(stream: str) -> float:
    """Where codec and container differ, the container's comes last, and holds. 0:1 is unknown."""
    width, height = (_ASPECT.findall(stream) or [("1", "1")])[-1]
    return int(width) / int(height) if int(width) and int(height) else 1.0


def _rate(stream: str) -> float | None:
    match = _RATE.search(stream)
    return float(match[1]) * (1000 if match[2] else 1) if match else None


def _names(stream: str) -> list[str]:
    """A codec and its decoder: "mp3 (mp3float), 44100 Hz" has the names mp3 and mp3float."""
    return re.findall(r"\w+", stream.partition(",")[0])[:2]
