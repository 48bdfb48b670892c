"""Fit frames to a size: crop, pad or stretch them. Frames are (H, W, 3) uint8 RGB."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor

from pusa.errors import Reason, Rejected

Box = tuple[float, float, float, float]
LANCZOS = Image.Resampling.LANCZOS


@dataclass(frozen=True)
class Placement:
    """Which box of a source frame is shown, and at which size. All fields are plain values, so JSON can store them."""

    width: int
    height: int
    fit: str  # crop, pad or stretch
    box: Box  # left, top, right, bottom of what is shown, in pixels of the source
    pixel_aspect: float = 1.0  # width / height of a pixel of the source
    background: str = "black"  # colour of the bars

    def apply(self, frame: np.ndarray) -> np.ndarray:
        """Return the frame (H, W, 3) as (height, width, 3). It is resampled once (Lanczos).

        Raises:
            Rejected: DAMAGED: the box does not lie inside the frame.
        """
        left, top, right, bottom = self.box
        if right > frame.shape[1] + 0.01 or bottom > frame.shape[0] + 0.01:
            size = f"{frame.shape[1]}x{frame.shape[0]}"
            raise Rejected(
                Reason.DAMAGED, f"a frame of {size} is smaller than the box {self.box} (left, top, right, bottom)"
            )
        width, height = self.width, self.height
        if self.fit == "pad":  # without the bars; the shape of the box is kept to a pixel
            box_width, box_height = (right - left) * self.pixel_aspect, bottom - top
            if box_width / box_height > width / height:
                height = max(1, round(box_height / box_width * width))
            else:
                width = max(1, round(box_width / box_height * height))
        resized = np.asarray(Image.fromarray(frame).resize((width, height), LANCZOS, box=self.box))
        if (width, height) == (self.width, self.height):
            return resized
        padded = np.empty((self.height, self.width, 3), np.uint8)
        padded[:] = ImageColor.getrgb(self.background)[:3]
        x, y = round((self.width - width) / 2), round((self.height - height) / 2)
        padded[y : y + height, x : x + width] = resized
        return padded


class Collected:
    """Decoded frames, which arrive one by one and are kept once: (count, H, W, 3) uint8, of the first one's size."""

    def __init__(self, path: Path, capacity: int) -> None:
        """Prepare for at most `capacity` frames of a file; `path` is for messages."""
        self.count = 0
        self._path, self._capacity = path, capacity
        self._frames = np.empty(0, np.uint8)

    def add(self, frame: np.ndarray) -> None:
        """Add a frame (H, W, 3).

        Raises:
            Rejected: DAMAGED: it has another size than the first one.
        """
        if not self.count:
            self._frames = np.empty((self._capacity, *frame.shape), np.uint8)
        if frame.shape != (expected := self._frames.shape[1:]):
            size, other = (f"{shape[1]}x{shape[0]}" for shape in (expected, frame.shape))
            raise Rejected(Reason.DAMAGED, f"{self._path}: a frame of {other} follows frames of {size}")
        self._frames[self.count] = frame
        self.count += 1

    @property
    def frames(self) -> np.ndarray:
        """Return the frames that were added."""
        return self._frames[: self.count]


def flatten(frame: np.ndarray, background: str) -> np.ndarray:
    """Return a frame (H, W, 3), or one with alpha (H, W, 4) over a background colour, as (H, W, 3)."""
    if frame.shape[2] == 3:
        return frame
    image = Image.fromarray(frame)
    return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB"))


def compute_placement(
    source_width: int,
    source_height: int,
    pixel_aspect: float,
    width: int,
    height: int,
    fit: str = "crop",
    background: str = "black",
) -> Placement:
    """Return how frames of a source are placed in frames of `width` x `height` pixels.

    "crop" scales frames to cover the size and cuts off the same amount on both sides. "pad" scales them to lie inside
    the size, with bars of `background`. "stretch" changes their shape. The shape of a source frame is the displayed
    one, with `pixel_aspect`.
    """
    box = BOXES[fit](source_width, source_height, width / height / pixel_aspect)
    return Placement(width, height, fit, box, pixel_aspect, background)


def fit_frames(
    frames: np.ndarray,
    width: int,
    height: int,
    fit: str = "crop",
    background: str = "black",
    pixel_aspect: float = 1.0,
) -> np.ndarray:
    """Return frames (T, H, W, 3) fitted to a size; see `compute_placement`. Frames of that size are not changed."""
    if frames.shape[1:3] == (height, width) and pixel_aspect == 1:
        return frames
    place = compute_placement(frames.shape[2], frames.shape[1], pixel_aspect, width, height, fit, background)
    return np.stack([place.apply(frame) for frame in frames])


def _whole_frame(width: int, height: int, aspect: float) -> Box:
    return 0.0, 0.0, float(width), float(height)


def _largest_box(width: int, height: int, aspect: float) -> Box:
    """Return the largest centred box of an aspect ratio (width / height, in pixels of the source)."""
    box_width, box_height = (aspect * height, height) if width / height > aspect else (width, width / aspect)
    left, top = (width - box_width) * 0.5, (height - box_height) * 0.5
    return left, top, left + box_width, top + box_height


BOXES: dict[str, Callable[[int, int, float], Box]] = {
    "crop": _largest_box,
    "pad": _whole_frame,
    "stretch": _whole_frame,
}
