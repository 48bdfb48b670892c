"""Read, fit and write pictures and clips. Frames are (T, H, W, 3) uint8 RGB."""

import math
import stat
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from pusa.errors import MediaError
from pusa.files import atomic

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
MAX_IMAGE_PIXELS = 64_000_000
# Pillow's decoders raise what their formats' parsers do.
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)
QUALITY = ("-crf", "12", "-preset", "medium")


@dataclass(frozen=True)
class VideoFacts:
    """What a file says of itself."""

    num_frames: int
    fps: float
    width: int
    height: int


def probe(path: Path) -> VideoFacts:
    """The number of frames, frame rate and size of a video.

    Raises:
        MediaError: it is missing or cannot be opened as a video.
    """
    reader = _open(path)
    height, width, _ = reader[0].shape
    return VideoFacts(len(reader), float(reader.get_avg_fps()), width, height)


def read_frames(path: Path, indices: Sequence[int]) -> np.ndarray:
    """The frames at `indices`, decoded.

    Raises:
        MediaError: the file cannot be opened, or a frame cannot be decoded.
    """
    from decord import DECORDError

    reader = _open(path)
    try:
        return reader.get_batch(list(indices)).asnumpy()
    except (DECORDError, IndexError) as error:
        raise MediaError(
            f"{path}: frames {indices[0]}..{indices[-1]} cannot be decoded: {_first_line(error)}"
        ) from error


def nearest_frames(count: int, rate: float) -> list[int]:
    """Of `count` frames those to show when every `rate`-th is due: the nearest, of two the earlier."""
    return [math.ceil(i * rate - 0.5) for i in range(int((count - 1) / rate + 1e-6) + 1)]


def require_file(path: Path) -> None:
    """Refuse what is no file: to open a pipe, say, would be to wait for its writer.

    Raises:
        MediaError: it is missing, something else, or its name is impossible.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise MediaError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(mode):
        raise MediaError(f"{path} is no file")


def count_pictures(path: Path) -> int:
    """How many pictures an image file holds; more than one if it is animated.

    Raises:
        MediaError: it cannot be read as a picture.
    """
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            return getattr(image, "n_frames", 1)
    except IMAGE_ERRORS as error:
        raise MediaError(f"{path} cannot be read as a picture: {_first_line(error)}") from error


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
        raise MediaError(f"{path} cannot be read as a picture: {_first_line(error)}") from error
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


def fit(frames: np.ndarray, width: int, height: int, how: str = "crop", background: str = "black") -> np.ndarray:
    """Give frames a size (Lanczos).

    "crop" scales them to cover it and cuts what juts out, evenly on both sides; "pad" scales them to lie within, with
    bars of `background`; "stretch" changes their shape.
    """
    if frames.shape[1:3] == (height, width):
        return frames
    return np.stack([np.asarray(FITS[how](Image.fromarray(frame), (width, height), background)) for frame in frames])


LANCZOS = Image.Resampling.LANCZOS
FITS: dict[str, Callable[[Image.Image, tuple[int, int], str], Image.Image]] = {
    "crop": lambda image, size, background: ImageOps.fit(image, size, LANCZOS),
    "pad": lambda image, size, background: ImageOps.pad(image, size, LANCZOS, ImageColor.getrgb(background)[:3]),
    "stretch": lambda image, size, background: image.resize(size, LANCZOS),
}


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
        raise OSError(f"{path} was not written whole: {_first_line(error)}") from error
    if written != count:
        raise OSError(f"{path} was not written whole: {written} of {count} frames")


def write_image(path: Path, frame: np.ndarray) -> None:
    """Write one frame (H, W, 3) as the suffix says."""
    with atomic(path) as partial:
        Image.fromarray(frame).save(partial, quality=90)


def _open(path: Path) -> Any:  # decord has no types
    from decord import DECORDError, VideoReader, cpu

    require_file(path)
    try:
        reader = VideoReader(str(path), ctx=cpu(0), num_threads=1)
    except (DECORDError, RuntimeError) as error:
        raise MediaError(f"{path} cannot be opened as a video: {_first_line(error)}") from error
    if len(reader) == 0:
        raise MediaError(f"{path} holds no frames")
    return reader


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip()[:200] if lines else type(error).__name__
