"""How a clip was cut from its source, as a picture; and strips of frames."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from pusa.errors import Reason, Rejected
from pusa.inspect.summary import spread
from pusa.manifest.models import Limits
from pusa.precompute.frames import check_source_unchanged, placement_of
from pusa.video.decoders import DECODERS, read_clip
from pusa.video.fit import LANCZOS, Box


def read_source(clip: Mapping[str, Any], frames: Sequence[int], fitted: bool = False) -> np.ndarray:
    """Frames (T, H, W, 3) uint8 of a row's source: whole and upright, or cut and fitted as the clip is.

    Raises:
        Rejected: the source is gone, has changed since, or cannot be decoded.
    """
    path = Path(clip["source"])
    if clip["decoder"] == "none":
        raise Rejected(Reason.NOT_A_VIDEO, "it was imported, and knows of no video")
    if clip["decoder"] not in DECODERS:
        raise Rejected(Reason.NOT_A_VIDEO, f"{path} is read by {clip['decoder']!r}; known are {', '.join(DECODERS)}")
    try:
        check_source_unchanged(clip)
    except OSError as error:
        raise Rejected(Reason.UNREADABLE, f"{path} cannot be read: {error.strerror or error}") from error
    placement = placement_of(clip) if fitted else None
    start = clip["start_time"] if min(frames) == min(clip["frames"]) else None
    seconds = Limits().decoding_seconds
    if list(frames) == list(clip["frames"]):
        return read_clip(path, frames, clip["decoder"], seconds, placement, start)
    if clip["decoder"] != "ffmpeg" and start is not None:
        with suppress(Rejected):  # it gives the frames from that time on, or nothing
            return read_clip(path, frames, "ffmpeg_seek", seconds, placement, start)
    return read_clip(path, frames, "ffmpeg", seconds, placement)  # the clip's decoder is right for its frames alone


LARGEST = (320, 240)  # pixels
STRIP_HEIGHT, STRIP_FRAMES = 128, 8
DIMMED = 0.3  # how bright what was cut away still is
OUTLINE = (255, 196, 0)


def boxes(clip: Mapping[str, Any], width: int, height: int) -> tuple[Box, Box]:
    """Where a source's frame lies as it is displayed, and what a clip keeps, which has bars where that juts out.

    Args:
        clip: a row with its cut.
        width: of the frame as decoded.
        height: of the frame, as decoded and as displayed.
    """
    aspect = clip["pixel_aspect"]
    left, top, right, bottom = clip["box"]
    kept = (left * aspect, top, right * aspect, bottom)
    if clip["fit"] == "pad":
        kept = _grown(kept, clip["width"] / clip["height"])
    return (0.0, 0.0, width * aspect, float(height)), kept


def as_cut(frame: np.ndarray, clip: Mapping[str, Any]) -> Image.Image:
    """A source's frame (H, W, 3) uint8 as it is displayed: what was cut away dimmed, what is kept outlined."""
    shown, kept = boxes(clip, frame.shape[1], frame.shape[0])
    canvas = (min(shown[0], kept[0]), min(shown[1], kept[1]), max(shown[2], kept[2]), max(shown[3], kept[3]))
    width, height = canvas[2] - canvas[0], canvas[3] - canvas[1]
    scale = min(LARGEST[0] / width, LARGEST[1] / height)
    picture = Image.new("RGB", _size(width * scale, height * scale))
    left, top, right, bottom = _placed(shown, canvas, scale)
    picture.paste(Image.fromarray(frame).resize(_size(right - left, bottom - top), LANCZOS), (left, top))
    left, top, right, bottom = _placed(kept, canvas, scale)
    bright = picture.crop((left, top, right, bottom))
    picture = picture.point(lambda level: level * DIMMED)
    picture.paste(bright, (left, top))
    ImageDraw.Draw(picture).rectangle((left, top, right - 1, bottom - 1), outline=OUTLINE, width=2)
    return picture


def film(video: np.ndarray) -> Image.Image:
    """Frames of a video (T, H, W, 3) uint8 from the first to the last, side by side."""
    height, width = video.shape[1:3]
    size = _size(width * STRIP_HEIGHT / height, STRIP_HEIGHT)
    pictures = [Image.fromarray(video[i]).resize(size, LANCZOS) for i in spread(len(video), STRIP_FRAMES)]
    return Image.fromarray(np.concatenate([np.asarray(picture) for picture in pictures], 1))


def _size(width: float, height: float) -> tuple[int, int]:
    return max(1, round(width)), max(1, round(height))


def _placed(box: Box, canvas: Box, scale: float) -> tuple[int, int, int, int]:
    """A box in pixels of the picture, one wide and high at least."""
    left, top = round((box[0] - canvas[0]) * scale), round((box[1] - canvas[1]) * scale)
    right, bottom = round((box[2] - canvas[0]) * scale), round((box[3] - canvas[1]) * scale)
    return left, top, max(left + 1, right), max(top + 1, bottom)


def _grown(box: Box, aspect: float) -> Box:
    """The smallest box of another shape (width / height) around the same middle that holds it."""
    left, top, right, bottom = box
    width, height = max(right - left, (bottom - top) * aspect), max(bottom - top, (right - left) / aspect)
    x, y = (left + right) / 2, (top + bottom) / 2
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2
