"""Read and write pictures and clips. Frames are (T, H, W, 3) uint8 RGB."""

import fcntl
import logging
import math
import os
import struct
import subprocess
import weakref
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from pusa.errors import MediaError
from pusa.manifest.models import Limits
from pusa.system.files import State, atomic, remove, state_of
from pusa.system.processes import kill
from pusa.system.text import first_line, printable
from pusa.video.conversion import NONE, Conversion
from pusa.video.decoders import read_clip
from pusa.video.ffmpeg import open_regular_file
from pusa.video.fit import Placement, compute_placement
from pusa.video.formats import (
    TO_BT709,
    beside,
    make_gif,
    output_arguments,
    require_encoders,
    require_frames,
    start_ffmpeg,
    with_sources,
    writing_error,
)
from pusa.video.provenance import Provenance, append_packet
from pusa.video.srgb import to_srgb
from pusa.video.survey import survey_video

log = logging.getLogger(__name__)
VIDEO_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".wmv", ".flv", ".mpg", ".mpeg", ".ts", ".mts",
    ".m2ts", ".ogv",
)  # fmt: skip
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
MAX_IMAGE_PIXELS = 64_000_000
# Pillow lets through the exceptions of its parsers.
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)
PIPE_BYTES = 1 << 20  # to ffmpeg, the most that Linux allows by default: fewer waits for an encoder that starts
ENCODER_QUALITY = ("-crf", "12", "-preset", "medium")
# For clips that a user names: only files that would never end are refused.
CLIP_LIMITS = Limits(source_seconds=1e6, source_pixels=2**28, decoding_seconds=600)


@dataclass(frozen=True)
class VideoFacts:
    """Facts about a video that was decoded as a whole. Frames are upright, as `read_frames` returns them."""

    num_frames: int
    fps: float
    width: int
    height: int
    pixel_aspect: float  # width / height of a pixel
    conversion: Conversion  # by which frames become sRGB


def probe(path: Path) -> VideoFacts:
    """Decode a video as a whole, and return its number of frames, average frame rate and size.

    The result is kept until the file changes.

    Raises:
        MediaError: the file is missing, is not a video, or cannot be decoded as a whole.
    """
    with open_regular_file(path) as handle:
        state = state_of(handle)
    return _probe(path.absolute(), state)


@lru_cache(maxsize=256)
def _probe(path: Path, state: State) -> VideoFacts:
    survey = survey_video(path, CLIP_LIMITS)
    if survey.damage:
        raise MediaError(f"{path} is damaged: {survey.damage}")
    conversion, size = survey.conversion, (survey.width, survey.height)
    changes = [f"HDR became SDR ({conversion.tone_map})"] if conversion.tone_map != NONE else []
    changes += [f"fields became frames ({conversion.deinterlace})"] if conversion.deinterlace != NONE else []
    if changes:
        log.info("%s: %s", printable(path), "; ".join(changes))
    return VideoFacts(len(survey.times), survey.fps, *size, survey.pixel_aspect, survey.conversion)


def read_frames(
    path: Path, indices: Sequence[int], background: str = "black", placement: Placement | None = None
) -> np.ndarray:
    """Return the frames at `indices` (T, H, W, 3), over `background` where they are transparent.

    HDR is tone-mapped to SDR, and fields become frames, as ingest does by default. With a `placement` each frame is
    fitted as it is decoded, so that only one or two of them are in memory at their full size.

    Raises:
        MediaError: the file cannot be opened, or a frame cannot be decoded.
    """
    # Not with decord, which may seek to wrong frames: nobody has compared its frames of this file with the survey's.
    conversion = replace(probe(path).conversion, background=background)
    return read_clip(path, indices, "ffmpeg", CLIP_LIMITS.decoding_seconds, placement, conversion=conversion)


def read_fitted(
    path: Path, indices: Sequence[int], width: int, height: int, fit: str = "crop", background: str = "black"
) -> np.ndarray:
    """Return what `fit_frames` makes of the frames at `indices` and their pixel aspect: (T, height, width, 3).

    Raises:
        MediaError: as `read_frames`.
    """
    facts, placement = probe(path), None
    if (facts.width, facts.height, facts.pixel_aspect) != (width, height, 1):
        placement = compute_placement(facts.width, facts.height, facts.pixel_aspect, width, height, fit, background)
    return read_frames(path, indices, background, placement)


def nearest_frames(count: int, rate: float) -> list[int]:
    """Return which of `count` frames are nearest to every `rate`-th frame time; of two equally near, the earlier."""
    return [math.ceil(i * rate - 0.5) for i in range(int((count - 1) / rate + 1e-6) + 1)]


def require_file(path: Path) -> None:
    """Check that a path is a regular file. Opening a named pipe, for example, would wait for its writer.

    Raises:
        MediaError: the file is missing, is not a regular file, or its name is invalid.
    """
    with open_regular_file(path):
        pass


def count_pictures(path: Path) -> int:
    """Return how many pictures an image file holds: more than one if it is animated.

    Raises:
        MediaError: the file cannot be read as a picture.
    """
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            return getattr(image, "n_frames", 1)
    except IMAGE_ERRORS as error:
        raise MediaError(f"{path} cannot be read as a picture: {first_line(error)}") from error


def read_image(path: Path, background: str = "black") -> np.ndarray:
    """Return a PNG, JPEG or WebP picture as one frame (1, H, W, 3), upright, over `background` where it is transparent.

    Colours are converted to sRGB from the colour space that the file states.

    Raises:
        MediaError: the file is missing, has another format, has more than `MAX_IMAGE_PIXELS`, is HDR, or states its
            colours in a way that is damaged or unknown.
    """
    require_file(path)
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            pixels = image.width * image.height
            frame = _opaque(image, path, background) if pixels <= MAX_IMAGE_PIXELS else None
    except MediaError:  # a ValueError
        raise
    except UnidentifiedImageError as error:
        raise MediaError(f"{path} is not a picture; expected {', '.join(IMAGE_FORMATS)}") from error
    except IMAGE_ERRORS as error:
        raise MediaError(f"{path} cannot be read as a picture: {first_line(error)}") from error
    if frame is None:
        raise MediaError(f"{path} has {pixels} pixels; allowed are {MAX_IMAGE_PIXELS}")
    return frame[None]


def _opaque(image: ImageFile.ImageFile, path: Path, background: str) -> np.ndarray:
    """Return (H, W, 3) uint8 in sRGB, upright."""
    picture = to_srgb(image, path)
    picture.getexif()[ExifTags.Base.Orientation] = image.getexif().get(ExifTags.Base.Orientation, 1)
    picture = ImageOps.exif_transpose(picture)
    if picture.mode == "RGBA":
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, background), picture)
    return np.array(picture.convert("RGB"))


class VideoWriter:
    """Writes H.264 in 4:2:0, which every browser plays. ffmpeg encodes frames while the next ones are made.

    Colours are BT.709 in limited range at every size, and the file says so. The transfer's tag is BT.709's too: players
    show it and sRGB alike. Width and height must be even. A writer that is neither finished nor aborted ends its ffmpeg
    when it is deleted. Files of more `formats` are written beside the video; they do not change its bytes. A video with
    a `provenance` says what it is made of.
    """

    def __init__(
        self, path: Path, fps: float, formats: Sequence[str] = (), provenance: Provenance | None = None
    ) -> None:
        self.path, self.formats, self.provenance, self.frames = path, formats, provenance, 0
        self._rate, self._encoded = Fraction(fps).limit_denominator(), with_sources(formats)
        self._process: subprocess.Popen[bytes] | None = None

    def write(self, frames_THWC: np.ndarray) -> None:
        """Hand frames to ffmpeg, which is started with the first ones. Waits while ffmpeg is behind.

        Raises:
            MediaError: ffmpeg lacks the encoder of a format.
            OSError: ffmpeg ended; with the `errno` of a full disk or another cause that it names.
        """
        if self._process is None:
            self._start(*frames_THWC.shape[1:3])
        assert self._process is not None and self._process.stdin is not None
        try:
            for frame in frames_THWC:
                self._process.stdin.write(np.ascontiguousarray(frame).data)
        except BrokenPipeError:
            self._process.wait()
            raise self._error() from None
        self.frames += len(frames_THWC)

    def finish(self) -> None:
        """Wait for ffmpeg, and check its files.

        Raises:
            OSError: as `write`, or a file lacks frames.
        """
        if self._process is None:
            raise OSError(f"{self.path} was not written: there is no frame")
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the exit code says more
            self._process.stdin.close()
        if self._process.wait():
            raise self._error()
        if "gif" in self.formats:
            require_frames(beside(self.path, "lossless"), self.frames)
            make_gif(self.path, self._rate)
            if "lossless" not in self.formats:
                remove(beside(self.path, "lossless"))
        for path in (self.path, *(beside(self.path, name) for name in self.formats)):
            require_frames(path, self.frames)
        if self.provenance:
            append_packet(self.path, self.provenance)
        self._end()

    def abort(self) -> None:
        """End ffmpeg and remove the files."""
        if self._process is not None:
            self._end()
        for path in (self.path, *(beside(self.path, name) for name in {*self.formats, *self._encoded})):
            remove(path)

    def _start(self, height: int, width: int) -> None:
        require_encoders(self.formats)
        tags = self.provenance.tags() if self.provenance else []
        self._log, log_end = os.pipe()
        os.set_blocking(log_end, False)  # once the pipe is full, ffmpeg drops messages and does not wait for us
        try:
            self._process = start_ffmpeg(
                [
                    "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(self._rate),
                    "-i", "pipe:0", "-an", "-c:v", "libx264", "-pix_fmt", "yuv420p", *ENCODER_QUALITY, "-vf", TO_BT709,
                    "-movflags", "+faststart", *tags, f"file:{self.path}",
                    *output_arguments(self.path, self._encoded, tags),
                ],
                subprocess.PIPE, log_end,
            )  # fmt: skip
        except BaseException:
            os.close(self._log)
            raise
        finally:
            os.close(log_end)
        self._end = weakref.finalize(self, _end_ffmpeg, self._process, self._log)
        assert self._process.stdin is not None
        with suppress(AttributeError, OSError):  # not on Linux, or the user's pipes have too much already
            fcntl.fcntl(self._process.stdin, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def _error(self) -> OSError:
        """Return why ffmpeg, which has ended, wrote no complete file."""
        assert self._process is not None
        return writing_error(self.path, os.read(self._log, 1 << 16).decode("utf-8", "replace"), self._process)


def _end_ffmpeg(process: subprocess.Popen[bytes], log_handle: int) -> None:
    kill(process)
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # of frames that ffmpeg did not read
        process.stdin.close()
    os.close(log_handle)


def write_video(path: Path, frames: np.ndarray | Iterable[np.ndarray], fps: float) -> None:
    """Write frames (T, H, W, 3), or chunks of them as they are made, as `VideoWriter` does, atomically.

    Raises:
        OSError: the encoder failed, or its file is incomplete (a full disk, for example).
    """
    with atomic(path) as partial:
        writer = VideoWriter(partial, fps)
        try:
            for chunk in [frames] if isinstance(frames, np.ndarray) else frames:
                writer.write(chunk)
            writer.finish()
        except BaseException:
            writer.abort()
            raise


def write_image(path: Path, frame: np.ndarray) -> None:
    """Write one frame (H, W, 3). The suffix decides the format."""
    with atomic(path) as partial:
        Image.fromarray(frame).save(partial, quality=90)
