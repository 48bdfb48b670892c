"""Draw the world of the tiny models: captioned clips of coloured shapes that move, grow or bounce.

A clip depends on its `Scene` alone, and a random scene on its seed alone. Clips are (T, H, W, 3) uint8.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pusa.backbones.family import Geometry

SIZE = 64  # pixels, of both sides
NUM_FRAMES = 31
FPS = 24

COLOURS = {"red": (214, 46, 46), "green": (52, 172, 72), "blue": (48, 88, 226), "yellow": (238, 206, 50)}
GROUNDS = {"dark": (24, 24, 32), "light": (226, 226, 230)}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
MOTIONS = (*DIRECTIONS, "grow", "bounce")
PAIR_SHARE = 0.2  # of scenes with two shapes


@dataclass(frozen=True)
class Scene:
    """The content of a clip: one or two (colour, shape) pairs, a motion, a ground, and a seed for sizes and places."""

    things: tuple[tuple[str, str], ...]
    motion: str
    ground: str
    seed: int

    @property
    def caption(self) -> str:
        """Return the caption for training, e.g. "a red circle moves left on a dark background"."""
        subject = " and ".join(f"a {colour} {shape}" for colour, shape in self.things)
        ending = "s" if len(self.things) == 1 else ""
        verb = f"move{ending} {self.motion}" if self.motion in DIRECTIONS else self.motion + ending
        return f"{subject} {verb} on a {self.ground} background"


def clip_length(geometry: Geometry) -> int:
    """Return the most frames, `NUM_FRAMES` at most, that a clip for this geometry can have."""
    return geometry.num_frames(geometry.latent_frames(NUM_FRAMES))


def random_scene(seed: int) -> Scene:
    """Return the scene of a seed; `PAIR_SHARE` of all scenes hold two shapes."""
    rng = np.random.default_rng(seed)
    count = 2 if rng.random() < PAIR_SHARE else 1
    colours = rng.choice(list(COLOURS), count, replace=False)
    shapes = rng.choice(SHAPES, count)
    things = tuple((str(c), str(s)) for c, s in zip(colours, shapes, strict=True))
    return Scene(things, str(rng.choice(MOTIONS)), str(rng.choice(list(GROUNDS))), seed)


def scenes(start: int, count: int) -> Iterator[Scene]:
    """Yield the scenes of the `count` seeds start, start + 1, ..."""
    return (random_scene(seed) for seed in range(start, start + count))


def draw(scene: Scene, size: int = SIZE, num_frames: int = NUM_FRAMES) -> np.ndarray:
    """Draw a scene, antialiased; return (num_frames, size, size, 3) uint8."""
    rng = np.random.default_rng((scene.seed, 1))
    pixels = np.arange(size) + 0.5
    x, y = np.meshgrid(pixels, pixels)
    video = np.empty((num_frames, size, size, 3), np.float64)
    video[:] = _jitter(rng, GROUNDS[scene.ground], 4)
    for (colour, shape), (centre, radius) in zip(scene.things, _paths(scene, rng, num_frames), strict=True):
        ink = np.array(_jitter(rng, COLOURS[colour], 8))
        dx = x[None] - centre[:, 0, None, None] * size
        dy = y[None] - centre[:, 1, None, None] * size
        distance = _DISTANCES[shape](dx, dy, radius[:, None, None] * size)
        alpha = np.clip(0.5 - distance, 0, 1)[..., None]
        video += alpha * (ink - video)
    return np.round(video).astype(np.uint8)


def _jitter(rng: np.random.Generator, colour: tuple[int, int, int], spread: float) -> np.ndarray:
    return np.clip(np.array(colour) + rng.uniform(-spread, spread, 3), 0, 255)


def _paths(scene: Scene, rng: np.random.Generator, num_frames: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return for each shape its centre (T, 2) and radius (T,), as shares of the frame."""
    time = np.linspace(0, 1, num_frames)
    pair = len(scene.things) == 2
    radius = rng.uniform(0.14, 0.17) if pair else rng.uniform(0.20, 0.25)
    travel, growth = np.zeros((num_frames, 2)), np.ones(num_frames)
    if scene.motion in DIRECTIONS:
        length = rng.uniform(0.36, 0.44)
        travel = (time - 0.5)[:, None] * length * np.array(DIRECTIONS[scene.motion])
    elif scene.motion == "bounce":
        travel[:, 1] = 0.20 - 0.40 * np.abs(np.cos(np.pi * time))
    else:
        growth = 0.5 + 0.75 * time
    # Two shapes lie side by side across their path, so that neither covers the other.
    across = np.array([0, 0.21]) if scene.motion in ("left", "right") else np.array([0.21, 0])
    offsets = [-across, across] if pair else [np.zeros(2)]
    shift = 0.5 + rng.uniform(-0.05, 0.05, 2)
    return [(travel + offset + shift, radius * growth) for offset in offsets]


def _circle(dx: np.ndarray, dy: np.ndarray, radius: np.ndarray) -> np.ndarray:
    return np.hypot(dx, dy) - radius


def _square(dx: np.ndarray, dy: np.ndarray, radius: np.ndarray) -> np.ndarray:
    return np.maximum(abs(dx), abs(dy)) - 0.9 * radius


def _triangle(dx: np.ndarray, dy: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Return the distance to an upright triangle, whose base and height are 2.1 radii."""
    half = 1.05 * radius
    sides = (2 * abs(dx) - dy - half) / np.sqrt(5)
    return np.maximum(sides, dy - half)


_DISTANCES = {"circle": _circle, "square": _square, "triangle": _triangle}
