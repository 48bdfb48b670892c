"""Survey a video: decode every frame once, keep its time and a thumbnail, and check that none is missing."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pusa.errors import Reason, Rejected
from pusa.manifest.models import Limits
from pusa.video.ffmpeg import METADATA_PIPE, find_error, open_regular_file, run_ffmpeg

# The indentation of exactly three spaces tells ffmpeg's own lines from tags, which the file's author writes.
_STREAM = re.compile(r"\[info\] {3}Stream #0:\d+\S*: (\w+): (.*)")
_CONTAINER = re.compile(r"\[info\] Input #0, (\w+)")
_DURATION = re.compile(r"\[info\] {3}Duration: (\d+):(\d+):([\d.]+)")
_ROTATION = re.compile(r"\[info\] +Display Matrix: rotation of (-?[\d.]+) degrees")
_SIZE = re.compile(r", (\d{1,6})x(\d{1,6})\b")
_ASPECT = re.compile(r"\bSAR (\d+):(\d+)")
_HIGH_BIT_DEPTH = re.compile(r"(?:9|10|12|14|16|48|64)(?:le|be)\b")  # the end of a pixel format's name
_RATE = re.compile(r", ([\d.]+)(k?) (?:fps|tbr)\b")
NO_OUTPUT_ERROR = "At least one output file must be specified"  # expected: the header is read without any output
NO_VIDEO_MARKS = ("(attached pic)", "(timed thumbnails)")


@dataclass(frozen=True)
class Header:
    """The first video stream, upright as it is displayed. Cover art is not a video stream."""

    codec: str
    width: int
    height: int
    pixel_aspect: float  # width / height of a pixel
    fps: float | None
    rotation: int  # degrees counter-clockwise, 0..359
    duration: float | None  # seconds, of the longest stream
    container: str
    is_only_stream: bool  # then `duration` is that of the video
    other_codecs: tuple[str, ...]  # of the other streams
    high_bit_depth: bool  # more than 8 bits for each colour


def read_header(path: Path, seconds: float) -> Header:
    """Return what ffmpeg reads in the header of a file, within `seconds`.

    Raises:
        Rejected: EMPTY_FILE, UNREADABLE, NOT_A_VIDEO, NO_VIDEO_STREAM, DAMAGED (the index is missing),
            TIMEOUT, CRASHED.
    """
    with open_regular_file(path) as handle:
        if os.fstat(handle).st_size == 0:
            raise Rejected(Reason.EMPTY_FILE, f"{path} is empty")
    parser = _HeaderParser()
    with run_ffmpeg(path, (), seconds, parser.read_log, level="info"):
        pass
    return parser.header(path)


@dataclass
class _HeaderParser:
    """Collects a header from the lines of ffmpeg's log."""

    container: str = ""
    video: str = ""
    rotation: int = 0
    duration: float | None = None
    other_streams: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    _in_video: bool = False

    def read_log(self, line: str) -> None:
        if match := _STREAM.match(line):
            is_picture = any(mark in match[2] for mark in NO_VIDEO_MARKS)
            self._in_video = match[1] == "Video" and not self.video and not is_picture
            if self._in_video:
                self.video = match[2]
            else:
                self.other_streams.append(match[2])
        elif match := _CONTAINER.match(line):
            self.container = match[1]
        elif match := _DURATION.match(line):
            self.duration = int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3])
        elif self._in_video and (match := _ROTATION.match(line)):
            self.rotation = round(float(match[1])) % 360
        elif (error := find_error(line)) and error != NO_OUTPUT_ERROR:
            self.errors.append(error)

    def header(self, path: Path) -> Header:
        """Return the header, or raise `Rejected` if the file has no usable video stream."""
        if not self.video:
            if self.other_streams:
                detail = f"{path} has no video stream; its first stream is {self.other_streams[0]:.80}"
                raise Rejected(Reason.NO_VIDEO_STREAM, detail)
            if "moov atom not found" in self.errors:  # the file is an mp4, whose index is written last
                raise Rejected(Reason.DAMAGED, f"{path} lacks its index; the end of the file may be missing")
            cause = self.errors[0] if self.errors else "it contains no stream"
            raise Rejected(Reason.NOT_A_VIDEO, f"{path} is not a video that ffmpeg knows: {cause}")
        size = _SIZE.search(self.video)
        if size is None or self.video.startswith("none"):
            raise Rejected(Reason.NOT_A_VIDEO, f"{path} has a video stream that ffmpeg cannot decode: {self.video:.80}")
        # If codec and container differ, the container's aspect ratio is printed last, and is the right one.
        ratio = (_ASPECT.findall(self.video) or [("1", "1")])[-1]
        aspect = int(ratio[0]) / int(ratio[1]) if int(ratio[0]) and int(ratio[1]) else 1.0  # 0:1 means unknown
        width, height = int(size[1]), int(size[2])
        if self.rotation % 180 == 90:
            width, height, aspect = height, width, 1 / aspect
        rate = _RATE.search(self.video)
        return Header(
            codec=_codec_names(self.video)[0],
            width=width,
            height=height,
            pixel_aspect=aspect,
            fps=float(rate[1]) * (1000 if rate[2] else 1) if rate else None,
            rotation=self.rotation,
            duration=self.duration,
            high_bit_depth=_HIGH_BIT_DEPTH.search(self.video) is not None,
            container=self.container,
            is_only_stream=not self.other_streams,
            other_codecs=tuple(name for stream in self.other_streams for name in _codec_names(stream)),
        )


def _codec_names(stream: str) -> list[str]:
    """Return the names of a stream's codec and decoder: mp3 and mp3float for "mp3 (mp3float), 44100 Hz"."""
    return re.findall(r"\w+", stream.partition(",")[0])[:2]


THUMBNAIL_SIDE = 8  # pixels
# First convert to the RGB pixels that a reader gets. Scaling YUV and then converting would be off by more than the
# difference to the next frame.
THUMBNAIL_FILTERS = f"format=rgb24,scale={THUMBNAIL_SIDE}:{THUMBNAIL_SIDE}:flags=area"
_THUMBNAIL_BYTES = THUMBNAIL_SIDE * THUMBNAIL_SIDE * 3
_FRAME = re.compile(r"frame:(\d+) +pts:(\S+) ")
_SCENE = "lavfi.scd.time="
# ffmpeg reports these as errors, but no picture is affected. The first two are about references that a stream, cut out
# of a longer one, names and does not use. The third is about the packet before the first picture.
HARMLESS_ERRORS = ("mmco: unref short failure", "co located POCs unavailable", "Invalid frame dimensions 0x0.")
CORRUPT_FRAME = "[warning] corrupt decoded frame"
# In these containers ffmpeg itself reports missing parts, and the last frame may stand for any length of time.
CONTAINERS_THAT_REPORT_GAPS = ("mov", "matroska")
MAX_FPS = 240  # the most that clip settings may ask for. Sources with more frames are refused: all are in memory
MISSING_SHARE = 0.05  # of its length, that a whole file may seem to lack, because headers are rounded


@dataclass(frozen=True)
class Survey:
    """A source whose frames can all be decoded. Frames are numbered from 0 in the order of their times."""

    width: int  # as decoded, upright
    height: int
    pixel_aspect: float  # width / height of a pixel
    fps: float  # average
    times: np.ndarray  # (T,) float64 seconds
    thumbnails: np.ndarray  # (T, 8, 8, 3) uint8
    scene_starts: tuple[int, ...]  # frames that begin a new scene
    container: str = ""  # ffmpeg's name of the container
    high_bit_depth: bool = False  # more than 8 bits for each colour


def survey_video(path: Path, limits: Limits, scenes: float | None = None) -> Survey:
    """Decode a whole video, within `limits.decoding_seconds`.

    Args:
        path: the file.
        limits: longer and larger videos are refused.
        scenes: the score from which ffmpeg's scdet reports a new scene; None reports none.

    Raises:
        Rejected: for the reasons of `read_header`, and TOO_LARGE, TOO_LONG, DAMAGED.
    """
    header = read_header(path, limits.decoding_seconds)
    if header.width * header.height > limits.source_pixels:
        allowed = f"{limits.source_pixels} pixels (limits.source_pixels)"
        detail = f"{path} has frames of {header.width}x{header.height}; allowed are {allowed}"
        raise Rejected(Reason.TOO_LARGE, detail)
    if header.duration and header.duration > limits.source_seconds:
        raise _too_long(path, header.duration, limits.source_seconds)
    # Each frame's time in microseconds, and what scdet reports, go to the pipe. Tags, which the author wrote, do not.
    filters = ["settb=AVTB", "metadata=mode=delete"]
    filters += [] if scenes is None else [f"scdet=threshold={scenes:g}"]
    filters += ["metadata=mode=add:key=seen:value=1", f"metadata=mode=print:file={METADATA_PIPE}:direct=1"]
    output = ("-map", "0:V:0", "-vf", ",".join([*filters, THUMBNAIL_FILTERS]), "-fps_mode", "passthrough",
              "-f", "rawvideo", "-pix_fmt", "rgb24", "pipe:1")  # fmt: skip
    options = ("-max_pixels", str(limits.source_pixels))  # the stream may be larger than its header states
    parser = _SurveyParser(path, limits.source_seconds, header)
    with run_ffmpeg(path, output, limits.decoding_seconds, parser.read_log, parser.read_metadata, options) as process:
        assert process.stdout is not None
        pixels = process.stdout.read()
    if process.returncode and not parser.errors:
        parser.errors.append(f"ffmpeg ended with exit code {process.returncode}")
    return parser.survey(pixels)


def _too_long(path: Path, seconds: float, allowed: float) -> Rejected:
    detail = f"{path} lasts {seconds:.6g} s or more; allowed are {allowed:g} s (limits.source_seconds)"
    return Rejected(Reason.TOO_LONG, detail)


@dataclass
class _SurveyParser:
    """Collects a survey from the lines of ffmpeg's log and metadata."""

    path: Path
    max_seconds: float
    header: Header
    times: list[float] = field(default_factory=list)
    scene_starts: list[int] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def read_log(self, line: str) -> None:
        if line.endswith(CORRUPT_FRAME):
            error: str | None = "a frame was decoded only in part"
        else:
            error = find_error(line, self.header.other_codecs)
        if error and not error.startswith(HARMLESS_ERRORS) and len(self.errors) < 3:
            self.errors.append(error)

    def read_metadata(self, line: str) -> None:
        if match := _FRAME.match(line):
            self._add_frame(int(match[1]), match[2])
        elif line.startswith(_SCENE) and len(self.times) > 1:
            self.scene_starts.append(len(self.times) - 1)

    def _add_frame(self, number: int, microseconds: str) -> None:
        index = len(self.times)
        if index >= self.max_seconds * MAX_FPS:
            allowed = f"{MAX_FPS} for each of {self.max_seconds:g} s (limits.source_seconds)"
            raise Rejected(Reason.TOO_LONG, f"{self.path} has {index} frames or more; allowed are {allowed}")
        if number != index:  # ffmpeg restarted its count
            raise self._damaged(f"from frame {index} on, frames have another size or format")
        if microseconds == "NOPTS":
            raise self._damaged(f"frame {index} has no time")
        now = int(microseconds) / 1e6
        if self.times and now <= self.times[-1]:
            raise self._damaged(f"frame {index} is at {now:.6g} s, and the one before at {self.times[-1]:.6g} s")
        self.times.append(now)
        if now - self.times[0] > self.max_seconds:
            raise _too_long(self.path, now - self.times[0], self.max_seconds)

    def survey(self, pixels: bytes) -> Survey:
        """Return the survey, or raise `Rejected` if something is missing. `pixels` are those of the thumbnails."""
        self._require_complete(len(pixels) / _THUMBNAIL_BYTES)
        times = np.array(self.times)
        return Survey(
            width=self.header.width,
            height=self.header.height,
            pixel_aspect=self.header.pixel_aspect,
            fps=(len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else self.header.fps or 1.0,
            times=times,
            thumbnails=np.frombuffer(pixels, np.uint8).reshape(-1, THUMBNAIL_SIDE, THUMBNAIL_SIDE, 3),
            scene_starts=tuple(self.scene_starts),
            container=self.header.container,
            high_bit_depth=self.header.high_bit_depth,
        )

    def _require_complete(self, thumbnails: float) -> None:
        if self.errors:
            raise self._damaged(f"after {len(self.times)} frames: {self.errors[0]}")
        if not self.times:
            raise self._damaged("it holds no frames")
        if thumbnails != len(self.times):
            raise self._damaged(f"{len(self.times)} frames were decoded, but {thumbnails:g} thumbnails arrived")
        # With sound, the duration in the header may be the sound's.
        if self.header.is_only_stream and self.header.container not in CONTAINERS_THAT_REPORT_GAPS:
            stated, end = self.header.duration or 0.0, self.times[-1] + 1 / (self.header.fps or 1.0)
            if end < stated * (1 - MISSING_SHARE):
                raise self._damaged(f"it ends after {end:.6g} of {stated:.6g} s")
        if self.header.container == "avi":
            # The header states how many bytes follow. The duration that ffmpeg reports fits what is left of the file.
            with open_regular_file(self.path) as handle:
                stated_bytes = 8 + int.from_bytes(os.pread(handle, 4, 4), "little")
                missing = 1 - os.fstat(handle).st_size / stated_bytes
            if missing > MISSING_SHARE:
                raise self._damaged(f"the last {missing:.0%} of the file are missing")

    def _damaged(self, fault: str) -> Rejected:
        return Rejected(Reason.DAMAGED, f"{self.path} is damaged: {fault}")
