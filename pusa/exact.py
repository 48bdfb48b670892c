"""Exact mode: the given pixels in place of those that pinned latents decode to. Frames are (T, H, W, 3) uint8."""

from collections.abc import Sequence

import numpy as np

from pusa.backbones.base import Geometry
from pusa.conditions import open_source
from pusa.tasks.base import Condition, Job, positions


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
    latent_frames = len(video) // geometry.temporal if job.cyclic else geometry.latent_frames(len(video))
    for condition in conditions:
        if not pinned(condition):
            continue
        pixels = open_source(condition, job, geometry).pixels()
        take = positions(condition.take, geometry.latent_frames(len(pixels)), "latent frame")
        place = positions(condition.place, latent_frames, "position")
        for i in pinned(condition):
            given, shown = _span(take[i], geometry), _shown(place[i], job, geometry, len(video))
            # A picture that is shown for several frames repeats; of several frames shown as one, the last counts.
            video[shown] = pixels[[*given, *given[-1:] * (len(shown) - len(given))][-len(shown) :]]
    return video


def _span(latent_frame: int, geometry: Geometry) -> list[int]:
    """The frames of a clip that a latent frame stands for."""
    end = geometry.num_frames(latent_frame + 1)
    return list(range(max(0, end - geometry.temporal), end))


def _shown(place: int, job: Job, geometry: Geometry, count: int) -> list[int]:
    """The frames of the result that a latent frame becomes; `Model.decode_ring` starts in the middle of the first."""
    if not job.cyclic:
        return _span(place, geometry)
    first = place * geometry.temporal - geometry.temporal // 2
    return [(first + i) % count for i in range(geometry.temporal)]
