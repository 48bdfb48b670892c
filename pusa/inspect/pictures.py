"""Draw how clips were cut from their sources, and strips of frames."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from pusa.errors import Reason, Rejected
from pusa.manifest.models import Limits
from pusa.precompute.frames import check_source_unchanged, placement_of
from pusa.video import sheets
from pusa.video.conversion import Conversion
from pusa.video.decoders import DECODERS, read_clip
from pusa.video.fit import LANCZOS, Box

LARGEST = (320, 240)  # pixels
STRIP_HEIGHT, STRIP_FRAMES = 128, 8
DIMMED = 0.3  # brightness of what was cut away
OUTLINE = (255, 196, 0)


def spread_indices(length: int, count: int) -> list[int]:
    """Return `count` of the indices below `length`, evenly spread from the first to the last; at most all of them."""
    if count >= length:
        return list(range(length))
    return [round(i * (length - 1) / max(1, count - 1)) for i in range(count)]


def read_source(clip: Mapping[str, Any], frames: Sequence[int], fitted: bool = False) -> np.ndarray:
    """Read frames (T, H, W, 3) uint8 of a row's source: whole and upright, or `fitted` as the clip is.

    Raises:
        Rejected: the source is gone, has changed, or cannot be decoded.
    """
    path = Path(clip["source"])
    if clip["decoder"] == "none":
        raise Rejected(Reason.NOT_A_VIDEO, "the clip was imported, so its video is not known")
    if clip["decoder"] not in DECODERS:
        raise Rejected(
            Reason.NOT_A_VIDEO, f"{path} is read by decoder {clip['decoder']!r}; expected one of {', '.join(DECODERS)}"
        )
    try:
        check_source_unchanged(clip)
    except OSError as error:
        raise Rejected(Reason.UNREADABLE, f"{path} cannot be read: {error.strerror or error}") from error
    placement, conversion = placement_of(clip) if fitted else None, Conversion.of_row(clip)
    start = clip["start_time"] if min(frames) == min(clip["frames"]) else None
    seconds = Limits().decoding_seconds
    if list(frames) == list(clip["frames"]):
        return read_clip(path, frames, clip["decoder"], seconds, placement, start, conversion)
    if clip["decoder"] != "ffmpeg" and start is not None and conversion.keeps_frames:
        with suppress(Rejected):  # it reads the frames from that time on, or fails
            return read_clip(path, frames, "ffmpeg_seek", seconds, placement, start, conversion)
    # The clip's own decoder was checked for the clip's frames only.
    return read_clip(path, frames, "ffmpeg", seconds, placement, None, conversion)


def display_boxes(clip: Mapping[str, Any], width: int, height: int) -> tuple[Box, Box]:
    """Return the box of a source's frame on the screen, and the box that a clip shows, which may be larger (bars).

    Args:
        clip: a row with the columns of `CUT`.
        width: of the decoded frame.
        height: of the decoded frame; the screen has the same.
    """
    aspect = clip["pixel_aspect"]
    left, top, right, bottom = clip["box"]
    kept = (left * aspect, top, right * aspect, bottom)
    if clip["fit"] == "pad":
        # Grow the box around its middle to the clip's shape.
        shape = clip["width"] / clip["height"]
        left, top, right, bottom = kept
        full_width, full_height = max(right - left, (bottom - top) * shape), max(bottom - top, (right - left) / shape)
        x, y = (left + right) / 2, (top + bottom) / 2
        kept = (x - full_width / 2, y - full_height / 2, x + full_width / 2, y + full_height / 2)
    return (0.0, 0.0, width * aspect, float(height)), kept


def draw_cut(frame: np.ndarray, clip: Mapping[str, Any]) -> Image.Image:
    """Draw a source's frame (H, W, 3) uint8 as displayed: the part that was cut away dimmed, the kept part outlined."""
    whole, kept = display_boxes(clip, frame.shape[1], frame.shape[0])
    canvas = (min(whole[0], kept[0]), min(whole[1], kept[1]), max(whole[2], kept[2]), max(whole[3], kept[3]))
    width, height = canvas[2] - canvas[0], canvas[3] - canvas[1]
    scale = min(LARGEST[0] / width, LARGEST[1] / height)
    picture = Image.new("RGB", _size(width * scale, height * scale))
    left, top, right, bottom = _to_pixels(whole, canvas, scale)
    picture.paste(Image.fromarray(frame).resize(_size(right - left, bottom - top), LANCZOS), (left, top))
    left, top, right, bottom = _to_pixels(kept, canvas, scale)
    bright = picture.crop((left, top, right, bottom))
    picture = picture.point(lambda level: level * DIMMED)
    picture.paste(bright, (left, top))
    ImageDraw.Draw(picture).rectangle((left, top, right - 1, bottom - 1), outline=OUTLINE, width=2)
    return picture


def film_strip(video: np.ndarray) -> Image.Image:
    """Draw frames of a video (T, H, W, 3) uint8, from the first to the last, side by side."""
    return Image.fromarray(sheets.film_strip(video[spread_indices(len(video), STRIP_FRAMES)], STRIP_HEIGHT, LANCZOS))


def _size(width: float, height: float) -> tuple[int, int]:
    return max(1, round(width)), max(1, round(height))


def _to_pixels(box: Box, canvas: Box, scale: float) -> tuple[int, int, int, int]:
    """Return a box in pixels of the picture, at least one pixel wide and high."""
    left, top = round((box[0] - canvas[0]) * scale), round((box[1] - canvas[1]) * scale)
    right, bottom = round((box[2] - canvas[0]) * scale), round((box[3] - canvas[1]) * scale)
    return left, top, max(left + 1, right), max(top + 1, bottom)
