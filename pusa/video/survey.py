"""Every frame of a source decoded once: when each is shown, roughly what it shows, and whether all are there."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pusa.errors import Reason, Rejected
from pusa.manifest.models import Limits
from pusa.video.ffmpeg import NOTES, error_in, ffmpeg, opened

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


THUMBNAIL = 8  # pixels a side
# First the pixels that a reader gets: to scale YUV and convert that would be off by more than the next frame is.
SMALL = f"format=rgb24,scale={THUMBNAIL}:{THUMBNAIL}:flags=area"
_BYTES = THUMBNAIL * THUMBNAIL * 3
_FRAME = re.compile(r"frame:(\d+) +pts:(\S+) ")
_SCENE = "lavfi.scd.time="
# ffmpeg calls these errors, but no picture suffers: the first two are of references that a stream cut out of a longer
# one names and does not use, the third is said of the packet before the first picture.
HARMLESS = ("mmco: unref short failure", "co located POCs unavailable", "Invalid frame dimensions 0x0.")
SPOILT = "[warning] corrupt decoded frame"
# Of these ffmpeg itself says where a part is missing, and their last frame may stand for any time.
SAY_WHAT_IS_MISSING = ("mov", "matroska")
MOST_FPS = 240  # that a rule may ask for: a source with more frames is none, and they are all in memory
SLACK = 0.05  # share of its length that another may seem to lack: headers are rounded


@dataclass(frozen=True)
class Survey:
    """A source whose every frame could be decoded. Frames are numbered from 0 in the order of their times."""

    width: int  # decoded, upright
    height: int
    pixel_aspect: float  # width / height of a pixel
    fps: float  # on average
    times: np.ndarray  # (T,) float64 seconds
    thumbnails: np.ndarray  # (T, 8, 8, 3) uint8
    scene_starts: tuple[int, ...]  # frames that begin another scene
    container: str = ""  # ffmpeg's name of it
    deep: bool = False  # more than 8 bits a colour


def survey(path: Path, limits: Limits, scenes: float | None = None) -> Survey:
    """Decode a whole video, in `limits.decoding_seconds` at most.

    Args:
        path: the file.
        limits: what is refused.
        scenes: the score at which ffmpeg's scdet sees a new scene; None looks for none.

    Raises:
        Rejected: as `read_header`, and TOO_LARGE, TOO_LONG, DAMAGED.
    """
    header = read_header(path, limits.decoding_seconds)
    _check_header(path, header, limits)
    notes = _SurveyNotes(path, limits.source_seconds, header)
    output = ("-map", "0:V:0", "-vf", _filters(scenes), "-fps_mode", "passthrough",
              "-f", "rawvideo", "-pix_fmt", "rgb24", "pipe:1")  # fmt: skip
    options = ("-max_pixels", str(limits.source_pixels))  # a stream may turn out larger than its header says
    with ffmpeg(path, output, limits.decoding_seconds, notes.hear, notes.note, options) as process:
        assert process.stdout is not None
        pixels = process.stdout.read()
    if process.returncode and not notes.errors:
        notes.errors.append(f"ffmpeg ended with exit code {process.returncode}")
    return notes.survey(pixels)


def _filters(scenes: float | None) -> str:
    """Each frame's time in microseconds and what scdet sees go to `NOTES`, and nothing that the file's author wrote."""
    scdet = [] if scenes is None else [f"scdet=threshold={scenes:g}"]
    metadata = ("mode=delete", "mode=add:key=seen:value=1", f"mode=print:file={NOTES}:direct=1")
    forget, mark, tell = (f"metadata={how}" for how in metadata)
    return ",".join(["settb=AVTB", forget, *scdet, mark, tell, SMALL])


def _check_header(path: Path, header: Header, limits: Limits) -> None:
    if header.width * header.height > limits.source_pixels:
        size, allowed = f"{header.width}x{header.height}", f"{limits.source_pixels} pixels (limits.source_pixels)"
        raise Rejected(Reason.TOO_LARGE, f"{path} has frames of {size}; allowed are {allowed}")
    if header.duration and header.duration > limits.source_seconds:
        raise _too_long(path, header.duration, limits.source_seconds)


def _missing_share(path: Path) -> float:
    """Of an AVI, whose header tells how many bytes follow. ffmpeg says a duration that suits what is there."""
    with opened(path) as handle:
        promised = 8 + int.from_bytes(os.pread(handle, 4, 4), "little")
        return 1 - os.fstat(handle).st_size / promised


def _too_long(path: Path, seconds: float, allowed: float) -> Rejected:
    detail = f"{path} lasts {seconds:.6g} s or more; allowed are {allowed:g} (limits.source_seconds)"
    return Rejected(Reason.TOO_LONG, detail)


def _too_many(path: Path, frames: int, allowed: float) -> Rejected:
    most = f"{MOST_FPS} for each of {allowed:g} s (limits.source_seconds)"
    return Rejected(Reason.TOO_LONG, f"{path} has {frames} frames or more; allowed are {most}")


@dataclass
class _SurveyNotes:
    """What is gathered line by line."""

    path: Path
    longest: float  # seconds
    header: Header
    times: list[float] = field(default_factory=list)
    scene_starts: list[int] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def hear(self, line: str) -> None:
        """Of the log."""
        error = "a frame was decoded only in part" if line.endswith(SPOILT) else error_in(line, self.header.others)
        if error and not error.startswith(HARMLESS) and len(self.errors) < 3:
            self.errors.append(error)

    def note(self, line: str) -> None:
        """Of what the filters write."""
        if match := _FRAME.match(line):
            self._frame(int(match[1]), match[2])
        elif line.startswith(_SCENE) and len(self.times) > 1:
            self.scene_starts.append(len(self.times) - 1)

    def _frame(self, number: int, microseconds: str) -> None:
        index = len(self.times)
        if index >= self.longest * MOST_FPS:
            raise _too_many(self.path, index, self.longest)
        if number != index:  # ffmpeg began to count anew
            raise self._damaged(f"from frame {index} on, frames have another size or format")
        if microseconds == "NOPTS":
            raise self._damaged(f"frame {index} has no time")
        now = int(microseconds) / 1e6
        if self.times and now <= self.times[-1]:
            raise self._damaged(f"frame {index} is at {now:.6g} s, and the one before at {self.times[-1]:.6g} s")
        self.times.append(now)
        if now - self.times[0] > self.longest:
            raise _too_long(self.path, now - self.times[0], self.longest)

    def survey(self, pixels: bytes) -> Survey:
        """All that was gathered, if nothing is missing."""
        times = np.array(self.times)
        self._check(len(pixels) / _BYTES)
        return Survey(
            width=self.header.width,
            height=self.header.height,
            pixel_aspect=self.header.pixel_aspect,
            fps=(len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else self.header.fps or 1.0,
            times=times,
            thumbnails=np.frombuffer(pixels, np.uint8).reshape(-1, THUMBNAIL, THUMBNAIL, 3),
            scene_starts=tuple(self.scene_starts),
            container=self.header.container,
            deep=self.header.deep,
        )

    def _check(self, pictures: float) -> None:
        if self.errors:
            raise self._damaged(f"after {len(self.times)} frames: {self.errors[0]}")
        if not self.times:
            raise self._damaged("it holds no frames")
        if pictures != len(self.times):
            raise self._damaged(f"{len(self.times)} frames were decoded, but {pictures:g} came through")
        promised, end = self.header.duration or 0.0, self.times[-1] + 1 / (self.header.fps or 1.0)
        # Beside sound, the header's duration may be the sound's.
        if self.header.alone and self.header.container not in SAY_WHAT_IS_MISSING and end < promised * (1 - SLACK):
            raise self._damaged(f"it ends after {end:.6g} of {promised:.6g} s")
        if self.header.container == "avi" and (missing := _missing_share(self.path)) > SLACK:
            raise self._damaged(f"its last {missing:.0%} are missing")

    def _damaged(self, what: str) -> Rejected:
        return Rejected(Reason.DAMAGED, f"{self.path} is damaged: {what}")
