"""Measure clips of the drawn world by their pixels: what they show, and how smoothly they move.

Clips are (T, H, W, 3) uint8, masks (T, H, W) bool, colours (3,) in levels of 255. In a cyclic clip the first frame
follows the last.
"""

from dataclasses import dataclass

import numpy as np

from pusa.tiny.shapes import COLOURS, DIRECTIONS, GROUNDS, SHAPES, Scene
from pusa.video.compare import frame_changes

FOREGROUND = 90  # summed channel difference from the ground
MIN_PIXELS = 20  # of a mask that counts as a shape
MIN_TRAVEL = 0.12  # of the frame
MIN_GROWTH = 1.8  # in area
MIN_OVERLAP = 0.8  # of a mask with an ideal shape; a person could not name a shape below that
EDGE = 8  # pixels around a shape that its motion may change: one latent pixel
STEEPEST = 0.01  # of all pixels; each drawn shape has more contour than that


@dataclass(frozen=True)
class Recognized:
    """What a clip of one shape shows; None if it cannot be recognized."""

    colour: str | None
    shape: str | None
    motion: str | None
    ground: str

    def matches(self, scene: Scene) -> dict[str, bool]:
        """Return for each property whether it is that of the scene."""
        colour, shape = scene.things[0]
        return {
            "colour": self.colour == colour,
            "shape": self.shape == shape,
            "motion": self.motion == scene.motion,
            "ground": self.ground == scene.ground,
        }


def recognize(clip: np.ndarray) -> Recognized:
    """Return colour, shape, motion and ground of a clip that shows one shape."""
    colour, masks = ground_colour(clip), foreground(clip)
    visible = masks.sum((1, 2)) >= MIN_PIXELS
    ground = min(GROUNDS, key=lambda name: float(np.abs(np.array(GROUNDS[name]) - colour).sum()))
    if visible.mean() < 0.8:
        return Recognized(None, None, None, ground)
    masks, clip = masks[visible], clip[visible]
    middle = len(clip) // 2
    votes = [_recognize_shape(mask) for mask in masks[:: max(1, len(masks) // 8)]]
    shape = max(set(votes), key=votes.count)
    majority = votes.count(shape) * 2 > len(votes)
    return Recognized(
        _recognize_colour(clip[middle], masks[middle]), shape if majority else None, _recognize_motion(masks), ground
    )


def share_as_captioned(clip: np.ndarray, scene: Scene) -> float:
    """Return the share of frames that, each by itself, show the scene's colour and shape."""
    right = [
        mask.sum() >= MIN_PIXELS and (_recognize_colour(frame, mask), _recognize_shape(mask)) == scene.things[0]
        for frame, mask in zip(clip, foreground(clip), strict=True)
    ]
    return float(np.mean(right))


def ground_colour(clip: np.ndarray) -> np.ndarray:
    """Return the ground's colour: the median of the upper and the lower border."""
    border = np.concatenate([clip[:, :2].reshape(-1, 3), clip[:, -2:].reshape(-1, 3)])
    return np.median(border, 0)


def foreground(clip: np.ndarray) -> np.ndarray:
    """Return masks of the pixels that are not ground."""
    return np.asarray(np.abs(clip.astype(int) - ground_colour(clip)).sum(-1) > FOREGROUND)


def motion_range(clip: np.ndarray) -> float:
    """Return the range of the shape's centre x, centre y or radius, whichever is largest, as a share of the frame."""
    masks = foreground(clip)
    masks = masks[masks.sum((1, 2)) >= MIN_PIXELS]
    if len(masks) == 0:
        return 0.0
    x, y, area = _tracks(masks)
    return float(max(np.ptp(track) for track in (x, y, np.sqrt(area / np.pi))))


def ground_flicker(clip: np.ndarray) -> float:
    """Return the mean change between neighbouring frames, in levels, of the pixels that are ground in both.

    Pixels within `EDGE` of a shape do not count.
    """
    size = 2 * EDGE + 1
    padded = np.pad(foreground(clip), ((0, 0), (EDGE, EDGE), (EDGE, EDGE)))
    near_shape = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(1, 2)).any((-2, -1))
    ground = np.logical_not(near_shape)
    still = ground[1:] & ground[:-1]
    change = np.abs(np.diff(clip.astype(float), axis=0)).mean(-1)
    return float(change[still].mean()) if still.any() else 0.0


def largest_change(clip: np.ndarray, cyclic: bool = False) -> float:
    """Return the largest change between neighbouring frames, divided by the mean one."""
    changes = frame_changes(clip, cyclic)
    return float(changes.max() / max(changes.mean(), 1e-6))


def wrap_jerk(clip: np.ndarray) -> float:
    """Return how abruptly motion changes where a cyclic clip starts again; 1 is as anywhere else in the clip.

    It is the mean second difference at the last and the first frame, divided by that at the other frames.
    """
    frames = clip.astype(float)
    bend = np.abs(np.roll(frames, -1, 0) - 2 * frames + np.roll(frames, 1, 0)).mean((1, 2, 3))
    return float(bend[[0, -1]].mean() / max(bend[1:-1].mean(), 1e-6))


def colour_drift(first: np.ndarray, last: np.ndarray) -> tuple[float, float]:
    """Return how far the colours of ground and shape differ between two clips: means over channels, in levels.

    A shape that has disappeared counts as ground.
    """
    ground = np.abs(ground_colour(first) - ground_colour(last)).mean()
    return float(ground), float(np.abs(_shape_colour(first) - _shape_colour(last)).mean())


def sharpness(clip: np.ndarray) -> float:
    """Return the mean gradient of the steepest pixels, which lie on contours, in levels per pixel."""
    down, across = np.gradient(clip.astype(float), axis=(1, 2))
    slopes = np.sort(np.hypot(down, across).mean(-1).ravel())
    return float(slopes[-max(1, int(len(slopes) * STEEPEST)) :].mean())


def _shape_colour(clip: np.ndarray) -> np.ndarray:
    """Return the shape's mean colour over the frames that show it; the ground's if none does."""
    masks = foreground(clip)
    colours = [_core_colour(frame, mask) for frame, mask in zip(clip, masks, strict=True) if mask.sum() >= MIN_PIXELS]
    return np.mean(colours, 0) if colours else ground_colour(clip)


def _core_colour(frame: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the mean colour of the half of a mask's pixels that are closest to their median."""
    pixels = frame[mask].astype(float)
    order = np.argsort(np.abs(pixels - np.median(pixels, 0)).sum(1))
    return pixels[order[: max(1, len(pixels) // 2)]].mean(0)


def _recognize_colour(frame: np.ndarray, mask: np.ndarray) -> str:
    core = _core_colour(frame, mask)
    return min(COLOURS, key=lambda c: float(np.abs(np.array(COLOURS[c]) - core).sum()))


def _recognize_shape(mask: np.ndarray) -> str | None:
    """Return the shape whose ideal form, scaled to the mask's bounding box, overlaps the mask most."""
    rows, columns = np.where(mask.any(1))[0], np.where(mask.any(0))[0]
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    y, x = ((np.arange(n) + 0.5) / n * 2 - 1 for n in box.shape)
    x, y = np.meshgrid(x, y)
    ideal = {"circle": np.hypot(x, y) <= 1, "square": np.ones_like(box), "triangle": np.abs(x) <= (y + 1) / 2}
    overlap = {name: (box & shape).sum() / (box | shape).sum() for name, shape in ideal.items()}
    best = max(SHAPES, key=lambda name: float(overlap[name]))
    return best if overlap[best] >= MIN_OVERLAP else None


def _tracks(masks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the centre x and y and the area of each mask, each (T,), as shares of the frame."""
    height, width = masks.shape[1:]
    area = masks.sum((1, 2))
    x = (masks.sum(1) * np.arange(width)).sum(1) / area / width
    y = (masks.sum(2) * np.arange(height)).sum(1) / area / height
    return x, y, area / (height * width)


def _recognize_motion(masks: np.ndarray) -> str | None:
    x, y, area = _tracks(masks)
    fifth = max(1, len(masks) // 5)
    dx, dy = (float(track[-fifth:].mean() - track[:fifth].mean()) for track in (x, y))
    ends = (y[:fifth].mean() + y[-fifth:].mean()) / 2
    sag = float(y[len(y) // 2 - 2 : len(y) // 2 + 3].mean() - ends)
    if area[-fifth:].mean() / area[:fifth].mean() > MIN_GROWTH and max(abs(dx), abs(dy)) < MIN_TRAVEL:
        return "grow"
    if sag > MIN_TRAVEL and sag > max(abs(dx), abs(dy)):
        return "bounce"
    name, along = max(((d, dx * vx + dy * vy) for d, (vx, vy) in DIRECTIONS.items()), key=lambda pair: pair[1])
    return name if along > MIN_TRAVEL else None
