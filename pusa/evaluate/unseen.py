"""Write the clips that models are measured with: drawn, of one shape each, from seeds that no training used."""

from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from pusa.backbones.family import Family
from pusa.tiny.shapes import FPS, NUM_FRAMES, SIZE, Scene, clip_length, draw, random_scene
from pusa.video.media import read_frames, write_image, write_video
from pusa.weights.model import Model

FIRST_SEED = 2_000_000  # training used much lower seeds
STEPS, GUIDANCE = 20, 1.5


@dataclass(frozen=True)
class UnseenClip:
    """A clip on disk, its first and last picture, and another clip on the same ground; frames as the files decode."""

    scene: Scene
    video: Path
    first: Path
    last: Path
    other: Path
    frames: np.ndarray
    other_frames: np.ndarray


@dataclass(frozen=True)
class RoundTrip:
    """An unseen clip after a model's VAE: its frames, its two pictures, each (1, H, W, 3), and the other clip."""

    frames: np.ndarray
    first: np.ndarray
    last: np.ndarray
    other: np.ndarray


def job_settings(family: Family) -> dict[str, Any]:
    """Return the settings of jobs that make videos like the unseen clips, with the family's own noise schedule."""
    size = {"width": SIZE, "height": SIZE, "num_frames": clip_length(family.geometry)}
    return {**size, "steps": STEPS, "guidance": GUIDANCE, "noise_schedule": family.job.noise_schedule}


def unseen_scenes(count: int) -> list[Scene]:
    """Return the first `count` scenes of one shape from the unseen seeds."""
    scenes = (random_scene(seed) for seed in range(FIRST_SEED, FIRST_SEED + 10 * count))
    return [scene for scene in scenes if len(scene.things) == 1][:count]


def write_unseen_clip(scene: Scene, stem: Path, num_frames: int = NUM_FRAMES) -> UnseenClip:
    """Write the files of a scene, and of the next scene of one shape on the same ground, named after `stem`."""
    later = (random_scene(seed) for seed in count(scene.seed + 1))
    other_scene = next(other for other in later if len(other.things) == 1 and other.ground == scene.ground)
    video, other = stem.with_suffix(".mp4"), stem.with_suffix(".other.mp4")
    first, last = stem.with_suffix(".first.png"), stem.with_suffix(".last.png")
    write_video(video, draw(scene, num_frames=num_frames), FPS)
    write_video(other, draw(other_scene, num_frames=num_frames), FPS)
    frames, other_frames = (read_frames(path, range(num_frames)) for path in (video, other))
    write_image(first, frames[0])
    write_image(last, frames[-1])
    return UnseenClip(scene, video, first, last, other, frames, other_frames)


def round_trip(clip: UnseenClip, model: Model) -> RoundTrip:
    """Encode and decode a clip, its pictures and the other clip."""
    inputs = (clip.frames, clip.frames[:1], clip.frames[-1:], clip.other_frames)
    return RoundTrip(*(model.decode(model.encode(frames)) for frames in inputs))
