"""Contact sheets: of each video its name and a strip of frames, one below the other. Pictures are (H, W, 3) uint8."""

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FRAMES = 8
HEIGHT = 96  # pixels of a strip
LABEL = 150  # pixels of a name beside it
LETTERS, LINES = 18, 4  # of a name
BETWEEN = 4  # pixels from one strip to the next


def shown(count: int) -> list[int]:
    """Which of a video's frames a strip shows, from the first to the last: each once, though they be fewer."""
    return np.linspace(0, count - 1, min(count, FRAMES)).round().astype(int).tolist()


def labelled(name: str, frames_THWC: np.ndarray) -> np.ndarray:
    """A name, of one line or several, and beside it these frames."""
    picture = Image.fromarray(np.concatenate(list(frames_THWC), 1))
    picture = picture.resize((round(picture.width * HEIGHT / picture.height), HEIGHT))
    lines = [line[i : i + LETTERS] for line in name.splitlines() for i in range(0, len(line), LETTERS)][:LINES]
    label = _written("\n".join(lines), LABEL, HEIGHT)
    return np.concatenate([label, np.asarray(picture)], 1)


def told(text: str, width: int) -> np.ndarray:
    """A text over the whole width, in as many lines as it takes up to `LINES`."""
    lines = textwrap.wrap(text, max(1, width // 8), max_lines=LINES, placeholder=" ...") or [""]
    return _written("\n".join(lines), width, 10 + 18 * len(lines))


def stacked(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures one below the other, on white; one white pixel where there are none."""
    width = max((picture.shape[1] for picture in pictures), default=1)
    gaps = [((0, BETWEEN), (0, width - picture.shape[1]), (0, 0)) for picture in pictures]
    padded = [np.pad(picture, gap, constant_values=255) for picture, gap in zip(pictures, gaps, strict=True)]
    return np.concatenate(padded) if padded else np.full((1, 1, 3), 255, np.uint8)


def _written(text: str, width: int, height: int) -> np.ndarray:
    paper = Image.new("RGB", (width, height), "white")
    font = ImageFont.load_default(14)
    ImageDraw.Draw(paper).multiline_text((6, height // 2), text, "black", font, anchor="lm")
    return np.asarray(paper)
