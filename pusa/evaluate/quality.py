"""How good a clip of the tiny family is, in numbers read off its pixels: what it shows, and how it goes on.

Clips are (T, H, W, 3) uint8, masks (T, H, W) bool, colours (3,) in levels of 255. In a cyclic clip the last frame is
followed by the first.
"""

from dataclasses import dataclass

import numpy as np

from pusa.tiny.shapes import COLOURS, DIRECTIONS, GROUNDS, SHAPES, Scene
from pusa.video.compare import frame_changes

FOREGROUND = 90  # summed channel difference from the ground
MIN_PIXELS = 20
MIN_TRAVEL = 0.12  # of the frame
MIN_GROWTH = 1.8  # in area
MIN_OVERLAP = 0.8  # of a mask with the shape it is taken for: below, a person would not name it
EDGE = 8  # pixels around a shape that its motion may change: one cell of the latents
STEEPEST = 0.01  # of all pixels; each shape of this world has more contour than that


@dataclass(frozen=True)
class Seen:
    """What a clip of one shape shows; None where it cannot be told."""

    colour: str | None
    shape: str | None
    motion: str | None
    ground: str

    def agrees(self, scene: Scene) -> dict[str, bool]:
        """Property -> whether it is what the scene says."""
        colour, shape = scene.things[0]
        return {
            "colour": self.colour == colour,
            "shape": self.shape == shape,
            "motion": self.motion == scene.motion,
            "ground": self.ground == scene.ground,
        }


def look(clip: np.ndarray) -> Seen:
    """Name colour, shape, motion and ground of a clip that shows one shape."""
    ground, masks = ground_of(clip), foreground(clip)
    visible = masks.sum((1, 2)) >= MIN_PIXELS
    name = min(GROUNDS, key=lambda g: float(np.abs(np.array(GROUNDS[g]) - ground).sum()))
    if visible.mean() < 0.8:
        return Seen(None, None, None, name)
    masks, clip = masks[visible], clip[visible]
    middle = len(clip) // 2
    return Seen(_colour(clip[middle], masks[middle]), _shape(masks), _motion(masks), name)


def shown(clip: np.ndarray, scene: Scene) -> float:
    """The share of frames, each looked at by itself, in which colour and shape are as the scene says."""
    wanted = scene.things[0]
    right = [
        mask.sum() >= MIN_PIXELS and (_colour(frame, mask), _shape_of(mask)) == wanted
        for frame, mask in zip(clip, foreground(clip), strict=True)
    ]
    return float(np.mean(right))


def ground_of(clip: np.ndarray) -> np.ndarray:
    """The ground's colour: the median of the upper and the lower border."""
    border = np.concatenate([clip[:, :2].reshape(-1, 3), clip[:, -2:].reshape(-1, 3)])
    return np.median(border, 0)


def foreground(clip: np.ndarray) -> np.ndarray:
    """Masks of what is not ground."""
    return np.asarray(np.abs(clip.astype(int) - ground_of(clip)).sum(-1) > FOREGROUND)


def travel(clip: np.ndarray) -> float:
    """The range of motion, in shares of the frame: how far the shape's centre or radius ranges, whichever is most."""
    masks = foreground(clip)
    masks = masks[masks.sum((1, 2)) >= MIN_PIXELS]
    if len(masks) == 0:
        return 0.0
    x, y, area = _tracks(masks)
    return float(max(np.ptp(track) for track in (x, y, np.sqrt(area / np.pi))))


def flicker(clip: np.ndarray) -> float:
    """The mean change of ground pixels between neighbours, in levels; of pixels that are ground in both frames."""
    ground = ~_grown(foreground(clip), EDGE)
    still = ground[1:] & ground[:-1]
    change = np.abs(np.diff(clip.astype(float), axis=0)).mean(-1)
    return float(change[still].mean()) if still.any() else 0.0


def largest(clip: np.ndarray, cyclic: bool = False) -> float:
    """The largest change between neighbours, in units of the mean one."""
    change = frame_changes(clip, cyclic)
    return float(change.max() / max(change.mean(), 1e-6))


def jerk(clip: np.ndarray) -> float:
    """How abruptly motion changes where a cyclic clip begins anew, in units of elsewhere: 1 is the same motion.

    It is the mean second difference at the last and the first frame over that at the others.
    """
    frames = clip.astype(float)
    bend = np.abs(np.roll(frames, -1, 0) - 2 * frames + np.roll(frames, 1, 0)).mean((1, 2, 3))
    return float(bend[[0, -1]].mean() / max(bend[1:-1].mean(), 1e-6))


def drift(first: np.ndarray, last: np.ndarray) -> tuple[float, float]:
    """How far the colour of the ground and of the shape differ between two clips: mean over channels, in levels.

    A shape that is not to be seen counts as ground.
    """
    ground = np.abs(ground_of(first) - ground_of(last)).mean()
    return float(ground), float(np.abs(_ink(first) - _ink(last)).mean())


def sharpness(clip: np.ndarray) -> float:
    """The gradient on contours: its mean magnitude over the steepest pixels, in levels a pixel."""
    down, across = np.gradient(clip.astype(float), axis=(1, 2))
    slopes = np.sort(np.hypot(down, across).mean(-1).ravel())
    return float(slopes[-max(1, int(len(slopes) * STEEPEST)) :].mean())


def _grown(masks: np.ndarray, pixels: int) -> np.ndarray:
    """Masks with so many pixels more on all sides."""
    size = 2 * pixels + 1
    padded = np.pad(masks, ((0, 0), (pixels, pixels), (pixels, pixels)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(1, 2))
    return np.asarray(windows.any((-2, -1)))


def _ink(clip: np.ndarray) -> np.ndarray:
    """The shape's colour: the mean over the frames that show it."""
    masks = foreground(clip)
    cores = [_core(frame, mask) for frame, mask in zip(clip, masks, strict=True) if mask.sum() >= MIN_PIXELS]
    return np.mean(cores, 0) if cores else ground_of(clip)


def _core(frame: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The mean colour of that half of a mask's pixels which are most alike."""
    pixels = frame[mask].astype(float)
    order = np.argsort(np.abs(pixels - np.median(pixels, 0)).sum(1))
    return pixels[order[: max(1, len(pixels) // 2)]].mean(0)


def _colour(frame: np.ndarray, mask: np.ndarray) -> str:
    core = _core(frame, mask)
    return min(COLOURS, key=lambda c: float(np.abs(np.array(COLOURS[c]) - core).sum()))


def _shape(masks: np.ndarray) -> str | None:
    """The majority's verdict over the frames."""
    votes = [_shape_of(mask) for mask in masks[:: max(1, len(masks) // 8)]]
    best = max(set(votes), key=votes.count)
    return best if votes.count(best) * 2 > len(votes) else None


def _shape_of(mask: np.ndarray) -> str | None:
    rows, columns = np.where(mask.any(1))[0], np.where(mask.any(0))[0]
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    y, x = ((np.arange(n) + 0.5) / n * 2 - 1 for n in box.shape)
    x, y = np.meshgrid(x, y)
    ideal = {"circle": np.hypot(x, y) <= 1, "square": np.ones_like(box), "triangle": np.abs(x) <= (y + 1) / 2}
    overlap = {name: (box & shape).sum() / (box | shape).sum() for name, shape in ideal.items()}
    best = max(SHAPES, key=lambda name: float(overlap[name]))
    return best if overlap[best] >= MIN_OVERLAP else None


def _tracks(masks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The centre x and y and the area of each mask, (T,), in shares of the frame."""
    height, width = masks.shape[1:]
    area = masks.sum((1, 2))
    x = (masks.sum(1) * np.arange(width)).sum(1) / area / width
    y = (masks.sum(2) * np.arange(height)).sum(1) / area / height
    return x, y, area / (height * width)


def _motion(masks: np.ndarray) -> str | None:
    x, y, area = _tracks(masks)
    third = max(1, len(masks) // 5)
    dx, dy = (float(track[-third:].mean() - track[:third].mean()) for track in (x, y))
    ends = (y[:third].mean() + y[-third:].mean()) / 2
    sag = float(y[len(y) // 2 - 2 : len(y) // 2 + 3].mean() - ends)
    if area[-third:].mean() / area[:third].mean() > MIN_GROWTH and max(abs(dx), abs(dy)) < MIN_TRAVEL:
        return "grow"
    if sag > MIN_TRAVEL and sag > max(abs(dx), abs(dy)):
        return "bounce"
    name, along = max(((d, dx * vx + dy * vy) for d, (vx, vy) in DIRECTIONS.items()), key=lambda pair: pair[1])
    return name if along > MIN_TRAVEL else None
