"""Draw contact sheets: each video's name and a strip of its frames, one below another. Pictures: (H, W, 3) uint8."""

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

STRIP_FRAMES = 8
STRIP_HEIGHT = 96  # pixels
LABEL_WIDTH = 150  # pixels of a name beside a strip
LABEL_CHARACTERS, MAX_LINES = 18, 4
GAP = 4  # pixels between strips


def strip_indices(count: int) -> list[int]:
    """Return which of a video's `count` frames a strip shows: evenly spaced, with the first and the last, each once."""
    return np.linspace(0, count - 1, min(count, STRIP_FRAMES)).round().astype(int).tolist()


def labelled_strip(name: str, frames_THWC: np.ndarray) -> np.ndarray:
    """Return a strip of frames with a name of one or several lines to its left."""
    picture = Image.fromarray(np.concatenate(list(frames_THWC), 1))
    picture = picture.resize((round(picture.width * STRIP_HEIGHT / picture.height), STRIP_HEIGHT))
    step = LABEL_CHARACTERS
    lines = [line[i : i + step] for line in name.splitlines() for i in range(0, len(line), step)]
    label = _draw_text("\n".join(lines[:MAX_LINES]), LABEL_WIDTH, STRIP_HEIGHT)
    return np.concatenate([label, np.asarray(picture)], 1)


def text_banner(text: str, width: int) -> np.ndarray:
    """Return a picture of a text, wrapped to `width` pixels and cut after `MAX_LINES` lines."""
    lines = textwrap.wrap(text, max(1, width // 8), max_lines=MAX_LINES, placeholder=" ...") or [""]
    return _draw_text("\n".join(lines), width, 10 + 18 * len(lines))


def stack_pictures(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Return pictures one below another on white; one white pixel if there are none."""
    width = max((picture.shape[1] for picture in pictures), default=1)
    margins = [((0, GAP), (0, width - picture.shape[1]), (0, 0)) for picture in pictures]
    padded = [np.pad(picture, margin, constant_values=255) for picture, margin in zip(pictures, margins, strict=True)]
    return np.concatenate(padded) if padded else np.full((1, 1, 3), 255, np.uint8)


def _draw_text(text: str, width: int, height: int) -> np.ndarray:
    image = Image.new("RGB", (width, height), "white")
    font = ImageFont.load_default(14)
    ImageDraw.Draw(image).multiline_text((6, height // 2), text, "black", font, anchor="lm")
    return np.asarray(image)
