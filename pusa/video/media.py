"""Read and write pictures and clips. Frames are (T, H, W, 3) uint8 RGB."""

import math
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pusa.errors import MediaError
from pusa.manifest.models import Limits
from pusa.system.files import atomic
from pusa.system.text import first_line
from pusa.video.decoders import read_clip
from pusa.video.ffmpeg import open_regular_file
from pusa.video.survey import survey_video

VIDEO_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".wmv", ".flv", ".mpg", ".mpeg", ".ts", ".mts",
    ".m2ts", ".ogv",
)  # fmt: skip
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
MAX_IMAGE_PIXELS = 64_000_000
# Pillow's decoders raise what their formats' parsers do.
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)
QUALITY = ("-crf", "12", "-preset", "medium")


# Of clips that somebody gives by hand: only what would never end is refused.
GIVEN = Limits(source_seconds=1e6, source_pixels=2**28, decoding_seconds=600)


@dataclass(frozen=True)
class VideoFacts:
    """What decoding a file whole tells of it. Frames are upright, as `read_frames` gives them."""

    num_frames: int
    fps: float
    width: int
    height: int
    pixel_aspect: float = 1.0  # width / height of a pixel


def probe(path: Path) -> VideoFacts:
    """The number of frames, average frame rate and size of a video.

    Raises:
        MediaError: it is missing, no video, or not one that can be decoded whole.
    """
    with open_regular_file(path) as handle:
        state = os.fstat(handle)
    return _probe(path.absolute(), (state.st_ino, state.st_size, state.st_mtime_ns))


@lru_cache(maxsize=256)
def _probe(path: Path, state: tuple[int, ...]) -> VideoFacts:
    found = survey_video(path, GIVEN)
    return VideoFacts(len(found.times), found.fps, found.width, found.height, found.pixel_aspect)


def read_frames(path: Path, indices: Sequence[int]) -> np.ndarray:
    """The frames at `indices`, decoded.

    Raises:
        MediaError: the file cannot be opened, or a frame cannot be decoded.
    """
    # Not decord: nobody has compared its frames of this file with the survey's, and seeking it errs.
    return read_clip(path, indices, "ffmpeg", GIVEN.decoding_seconds)


def nearest_frames(count: int, rate: float) -> list[int]:
    """Of `count` frames those to show when every `rate`-th is due: the nearest, of two the earlier."""
    return [math.ceil(i * rate - 0.5) for i in range(int((count - 1) / rate + 1e-6) + 1)]


def require_file(path: Path) -> None:
    """Refuse what is no file: to open a pipe, say, would be to wait for its writer.

    Raises:
        MediaError: it is missing, something else, or its name is impossible.
    """
    with open_regular_file(path):
        pass


def count_pictures(path: Path) -> int:
    """How many pictures an image file holds; more than one if it is animated.

    Raises:
        MediaError: it cannot be read as a picture.
    """
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            return getattr(image, "n_frames", 1)
    except IMAGE_ERRORS as error:
        raise MediaError(f"{path} cannot be read as a picture: {first_line(error)}") from error


def read_image(path: Path, background: str = "black") -> np.ndarray:
    """A picture (PNG, JPEG or WebP), upright, over `background` where it is transparent, as one frame (1, H, W, 3).

    Raises:
        MediaError: it is missing, no such picture, or larger than `MAX_IMAGE_PIXELS`.
    """
    require_file(path)
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            pixels = image.width * image.height
            frame = _opaque(ImageOps.exif_transpose(image), background) if pixels <= MAX_IMAGE_PIXELS else None
    except UnidentifiedImageError as error:
        raise MediaError(f"{path} is no picture of the kinds {', '.join(IMAGE_FORMATS)}") from error
    except IMAGE_ERRORS as error:
        raise MediaError(f"{path} cannot be read as a picture: {first_line(error)}") from error
    if frame is None:
        raise MediaError(f"{path} has {pixels} pixels; allowed are {MAX_IMAGE_PIXELS}")
    return frame[None]


def _opaque(image: Image.Image, background: str) -> np.ndarray:
    """(H, W, 3) uint8, whatever the picture's mode."""
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow's own conversion cuts off at 255
        return np.repeat((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)[..., None], 3, -1)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return np.array(image.convert("RGB"))


def write_video(path: Path, frames: np.ndarray, fps: float) -> None:
    """Write H.264 in 4:2:0, playable in every browser; width and height must be even.

    Raises:
        OSError: the encoder failed, or what it wrote is not whole (a full disk, say).
    """
    height, width = frames.shape[1:3]
    with atomic(path) as partial:
        writer = imageio_ffmpeg.write_frames(
            str(partial), (width, height), fps=fps, codec="libx264", pix_fmt_out="yuv420p", quality=None,
            output_params=[*QUALITY, "-movflags", "+faststart"], macro_block_size=2, ffmpeg_log_level="error",
        )  # fmt: skip
        writer.send(None)
        for frame in frames:
            writer.send(np.ascontiguousarray(frame))
        writer.close()
        _require_whole(partial, len(frames), path)


def _require_whole(partial: Path, count: int, path: Path) -> None:
    """imageio-ffmpeg does not look at ffmpeg's exit code; a file that lacks its end would pass for a video."""
    try:
        written, _ = imageio_ffmpeg.count_frames_and_secs(str(partial))
    except (OSError, RuntimeError) as error:
        raise OSError(f"{path} was not written whole: {first_line(error)}") from error
    if written != count:
        raise OSError(f"{path} was not written whole: {written} of {count} frames")


def write_image(path: Path, frame: np.ndarray) -> None:
    """Write one frame (H, W, 3) as the suffix says."""
    with atomic(path) as partial:
        Image.fromarray(frame).save(partial, quality=90)
