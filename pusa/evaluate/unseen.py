"""The clips that the family is measured by: drawn, of one shape each, and from seeds that no training saw."""

from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from pusa.tiny.shapes import FPS, NUM_FRAMES, SIZE, Scene, draw, random_scene
from pusa.video.media import read_frames, write_image, write_video
from pusa.weights.model import Model

FIRST_SEED = 2_000_000  # training used seeds far below
SETTINGS: dict[str, Any] = {"width": SIZE, "height": SIZE, "num_frames": NUM_FRAMES, "steps": 20, "guidance": 1.5}


@dataclass(frozen=True)
class Unseen:
    """A clip on disk with its first and last picture, and another clip of the same ground; frames as they decode."""

    scene: Scene
    video: Path
    first: Path
    last: Path
    other: Path
    frames: np.ndarray
    other_frames: np.ndarray


@dataclass(frozen=True)
class Returned:
    """What a model's VAE makes of an unseen clip, of its two pictures (1, H, W, 3) each, and of the other clip."""

    frames: np.ndarray
    first: np.ndarray
    last: np.ndarray
    other: np.ndarray


def unseen_scenes(count: int) -> list[Scene]:
    """Scenes of one shape each, from unseen seeds."""
    found = (random_scene(seed) for seed in range(FIRST_SEED, FIRST_SEED + 10 * count))
    return [scene for scene in found if len(scene.things) == 1][:count]


def store(scene: Scene, stem: Path) -> Unseen:
    """Write a scene's files, named after `stem`."""
    video, other = stem.with_suffix(".mp4"), stem.with_suffix(".other.mp4")
    first, last = stem.with_suffix(".first.png"), stem.with_suffix(".last.png")
    frames, other_frames = _written(video, scene), _written(other, _another(scene))
    write_image(first, frames[0])
    write_image(last, frames[-1])
    return Unseen(scene, video, first, last, other, frames, other_frames)


def returned(clip: Unseen, model: Model) -> Returned:
    """A clip, encoded and decoded."""
    parts = (clip.frames, clip.frames[:1], clip.frames[-1:], clip.other_frames)
    return Returned(*(model.decode(model.encode(part)) for part in parts))


def _another(scene: Scene) -> Scene:
    """The next scene of one shape on the same ground."""
    later = (random_scene(seed) for seed in count(scene.seed + 1))
    return next(found for found in later if len(found.things) == 1 and found.ground == scene.ground)


def _written(path: Path, scene: Scene) -> np.ndarray:
    write_video(path, draw(scene), FPS)
    return read_frames(path, range(NUM_FRAMES))
