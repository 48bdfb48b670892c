"""How good the tiny family is, in numbers: what a clip shows, read off its pixels, held against its prompt.

Clips are (T, H, W, 3) uint8.
"""

from dataclasses import dataclass

import numpy as np

from pusa.tiny.shapes import COLOURS, DIRECTIONS, GROUNDS, SHAPES, Scene

FOREGROUND = 90  # summed channel difference from the ground
MIN_PIXELS = 20
MIN_TRAVEL = 0.12  # of the frame
MIN_GROWTH = 1.8  # in area
MIN_OVERLAP = 0.8  # of a mask with the shape it is taken for: below, a person would not name it


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
    border = np.concatenate([clip[:, :2].reshape(-1, 3), clip[:, -2:].reshape(-1, 3)])
    ground = np.median(border, 0)
    masks = np.abs(clip.astype(int) - ground).sum(-1) > FOREGROUND
    visible = masks.sum((1, 2)) >= MIN_PIXELS
    name = min(GROUNDS, key=lambda g: float(np.abs(np.array(GROUNDS[g]) - ground).sum()))
    if visible.mean() < 0.8:
        return Seen(None, None, None, name)
    masks, clip = masks[visible], clip[visible]
    return Seen(_colour(clip, masks), _shape(masks), _motion(masks), name)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 arrays; 99 where they are equal."""
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return float(min(99.0, 10 * np.log10(255**2 / max(error, 1e-12))))


def seam(clip: np.ndarray, frame: int) -> float:
    """The change from `frame` to the next, in units of the clip's mean change between neighbours (1 is seamless)."""
    changes = np.abs(np.diff(clip.astype(float), axis=0)).mean((1, 2, 3))
    return float(changes[frame] / max(np.delete(changes, frame).mean(), 1e-6))


def _colour(clip: np.ndarray, masks: np.ndarray) -> str:
    middle = len(clip) // 2
    pixels = clip[middle][masks[middle]].astype(float)
    core = pixels[np.argsort(np.abs(pixels - np.median(pixels, 0)).sum(1))[: max(1, len(pixels) // 2)]].mean(0)
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


def _motion(masks: np.ndarray) -> str | None:
    size = masks.shape[1]
    area = masks.sum((1, 2))
    grid = np.arange(size) / size
    x = (masks.sum(1) * grid).sum(1) / area
    y = (masks.sum(2) * grid).sum(1) / area
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
