"""Draw contact sheets: each video's name and a strip of its frames, one below another. Pictures: (H, W, 3) uint8.

JPEG allows 65,535 pixels on a side, and videos may be far wider than they are high: strips and sheets are scaled down.
"""

import math
import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pusa.system.text import printable

STRIP_FRAMES = 8
STRIP_HEIGHT = 96  # pixels
STRIP_WIDTH = 4096  # pixels at most
LABEL_WIDTH = 150  # pixels of a name beside a strip
LABEL_CHARACTERS, MAX_LINES = 18, 4
BANNER_CHARACTERS = 1000  # at most; fewer fit
GAP = 4  # pixels between strips
SHEET_SIDE, SHEET_PIXELS = 65_000, 50_000_000  # of a sheet at most


def strip_indices(count: int) -> list[int]:
    """Return which of a video's `count` frames a strip shows: evenly spaced, with the first and the last, each once."""
    return np.linspace(0, count - 1, min(count, STRIP_FRAMES)).round().astype(int).tolist()


def film_strip(
    frames_THWC: np.ndarray,
    height: int = STRIP_HEIGHT,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
    most_width: int = STRIP_WIDTH,
) -> np.ndarray:
    """Return frames side by side, `height` pixels high, or less where `most_width` does not hold them."""
    count, frame_height, frame_width = frames_THWC.shape[:3]
    scale = min(height / frame_height, most_width / (count * frame_width))
    size = max(1, round(frame_width * scale)), max(1, round(frame_height * scale))
    return np.concatenate([np.asarray(Image.fromarray(frame).resize(size, resample)) for frame in frames_THWC], 1)


def labelled_strip(name: str, frames_THWC: np.ndarray) -> np.ndarray:
    """Return a strip of frames with a name of one or several lines to its left."""
    strip, step = film_strip(frames_THWC), LABEL_CHARACTERS
    strip = np.pad(strip, ((0, STRIP_HEIGHT - len(strip)), (0, 0), (0, 0)), constant_values=255)
    wrapped = [line[i : i + step] for line in _clean_lines(name, MAX_LINES * step) for i in range(0, len(line), step)]
    label = _draw_text("\n".join(wrapped[:MAX_LINES]), LABEL_WIDTH, STRIP_HEIGHT)
    return np.concatenate([label, strip], 1)


def text_banner(text: str, width: int) -> np.ndarray:
    """Return a picture of a text, wrapped to `width` pixels and cut after `MAX_LINES` lines."""
    clean = " ".join(_clean_lines(text, BANNER_CHARACTERS))
    lines = textwrap.wrap(clean, max(1, width // 8), max_lines=MAX_LINES, placeholder=" ...") or [""]
    return _draw_text("\n".join(lines), width, 10 + 18 * len(lines))


def stack_pictures(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Return pictures one below another on white, all scaled down if it would be too large; one white pixel if none."""
    width = max((picture.shape[1] for picture in pictures), default=1)
    height = sum(len(picture) + GAP for picture in pictures) or 1
    scale = min(1.0, SHEET_SIDE / width, SHEET_SIDE / height, math.sqrt(SHEET_PIXELS / (width * height)))
    sheet = np.full((max(1, math.ceil(height * scale)), max(1, math.ceil(width * scale)), 3), 255, np.uint8)
    top = 0
    for picture in pictures:
        first, last = math.floor(top * scale), math.floor((top + len(picture)) * scale)
        size = max(1, math.floor(picture.shape[1] * scale)), max(1, last - first)
        part = picture if scale == 1 else np.asarray(Image.fromarray(picture).resize(size))
        sheet[first : first + len(part), : part.shape[1]] = part
        top += len(picture) + GAP
    return sheet


def _clean_lines(text: str, longest: int) -> list[str]:
    """Return the lines of the beginning of a text, without characters that a font cannot draw."""
    return [printable(line, longest) for line in text[: longest + 1].splitlines()]


def _draw_text(text: str, width: int, height: int) -> np.ndarray:
    image = Image.new("RGB", (width, height), "white")
    font = ImageFont.load_default(14)
    ImageDraw.Draw(image).multiline_text((6, height // 2), text, "black", font, anchor="lm")
    return np.asarray(image)
