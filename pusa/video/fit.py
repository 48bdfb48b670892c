"""Give frames another size: what of a frame is shown, and how. Frames are (H, W, 3) uint8 RGB."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageColor

from pusa.errors import Reason, Rejected

Box = tuple[float, float, float, float]
LANCZOS = Image.Resampling.LANCZOS


@dataclass(frozen=True)
class Placement:
    """How a frame gets a size. Its fields are plain values, so that it can be sent and stored."""

    width: int
    height: int
    fit: str  # crop, pad or stretch
    box: Box  # left, top, right, bottom of what is shown, in pixels of the source
    pixel_aspect: float = 1.0  # width / height of a pixel of the source
    background: str = "black"  # of bars

    def apply(self, frame: np.ndarray) -> np.ndarray:
        """(H, W, 3) -> (height, width, 3), resampled once (Lanczos).

        Raises:
            Rejected: the frame is smaller than what of it is to be shown.
        """
        if self.box[2] > frame.shape[1] + 0.01 or self.box[3] > frame.shape[0] + 0.01:
            size = f"{frame.shape[1]}x{frame.shape[0]}"
            raise Rejected(
                Reason.DAMAGED, f"a frame is {size}, and {self.box} (left, top, right, bottom) is to be shown"
            )
        width, height = self._inner_size()
        shown = np.asarray(Image.fromarray(frame).resize((width, height), LANCZOS, box=self.box))
        if (width, height) == (self.width, self.height):
            return shown
        barred = np.empty((self.height, self.width, 3), np.uint8)
        barred[:] = ImageColor.getrgb(self.background)[:3]
        left, top = round((self.width - width) / 2), round((self.height - height) / 2)
        barred[top : top + height, left : left + width] = shown
        return barred

    def _inner_size(self) -> tuple[int, int]:
        """Without bars. With them, what is shown keeps its shape, to a pixel."""
        if self.fit != "pad":
            return self.width, self.height
        left, top, right, bottom = self.box
        width, height = (right - left) * self.pixel_aspect, bottom - top
        if width / height > self.width / self.height:
            return self.width, max(1, round(height / width * self.width))
        return max(1, round(width / height * self.height)), self.height


def placement(
    source_width: int,
    source_height: int,
    pixel_aspect: float,
    width: int,
    height: int,
    fit: str = "crop",
    background: str = "black",
) -> Placement:
    """Where frames of a source go in frames of `width` x `height`.

    "crop" scales them to cover it and cuts what juts out, evenly on both sides; "pad" scales them to lie within, with
    bars of `background`; "stretch" changes their shape. The source's shape is that in which it is to be shown.
    """
    box = BOXES[fit](source_width, source_height, width / height / pixel_aspect)
    return Placement(width, height, fit, box, pixel_aspect, background)


def fit(
    frames: np.ndarray,
    width: int,
    height: int,
    how: str = "crop",
    background: str = "black",
    pixel_aspect: float = 1.0,
) -> np.ndarray:
    """Give frames (T, H, W, 3) a size, as `placement` says; those that have it already stay as they are."""
    if frames.shape[1:3] == (height, width) and pixel_aspect == 1:
        return frames
    place = placement(frames.shape[2], frames.shape[1], pixel_aspect, width, height, how, background)
    return np.stack([place.apply(frame) for frame in frames])


def _whole(width: int, height: int, shape: float) -> Box:
    return 0.0, 0.0, float(width), float(height)


def _covering(width: int, height: int, shape: float) -> Box:
    """The largest box of a shape (width / height, in pixels of the source), in the middle."""
    box_width, box_height = (shape * height, height) if width / height > shape else (width, width / shape)
    left, top = (width - box_width) * 0.5, (height - box_height) * 0.5
    return left, top, left + box_width, top + box_height


BOXES: dict[str, Callable[[int, int, float], Box]] = {"crop": _covering, "pad": _whole, "stretch": _whole}
