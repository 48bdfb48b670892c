"""Exact mode: the given pixels in place of those that pinned latents decode to. Frames are (T, H, W, 3) uint8."""

from collections.abc import Sequence

import numpy as np

from pusa.backbones.geometry import Geometry
from pusa.conditions import open_source
from pusa.tasks.base import Condition, Job, positions, shown_as


def pinned(condition: Condition) -> list[int]:
    """Which of a condition's latent frames are kept as they are (multiplier 0)."""
    if condition.source is None:
        return []
    return [i for i, multiplier in enumerate(condition.multipliers) if multiplier == 0]


def paste(video: np.ndarray, conditions: Sequence[Condition], job: Job, geometry: Geometry) -> np.ndarray:
    """A copy of the video with the given pixels back in it.

    Raises:
        ConditionError: something pinned was given as latents, which have no pixels.
    """
    video = video.copy()
    latent_frames = len(job.passes(geometry)[-1].course.starts)
    for condition in conditions:
        if not pinned(condition):
            continue
        pixels = open_source(condition, job, geometry).pixels()
        take = positions(condition.take, geometry.latent_frames(len(pixels)), "latent frame")
        place = positions(condition.place, latent_frames, "position")
        for i in pinned(condition):
            given = geometry.frames_of(take[i])
            shown = shown_as(place[i], latent_frames, job, geometry)
            # A picture that is shown for several frames repeats; of several frames shown as one, the last counts.
            video[shown] = pixels[[*given, *given[-1:] * (len(shown) - len(given))][-len(shown) :]]
    return video
