"""Decode a job's latents to frames, put given pixels back, and measure what the frames show."""

import numpy as np
from torch import Tensor

from pusa.backbones.family import Geometry
from pusa.generate.conditions import open_input, pinned_indices
from pusa.tasks.base import Job, resolve_positions, video_frames_of
from pusa.video.compare import frame_changes
from pusa.weights.model import Model

CONSTANT = 2  # levels of 255 by which the pixels of a video may differ that shows nothing


def decode_job(job: Job, model: Model, z_CFhw: Tensor) -> np.ndarray:
    """Decode a job's latents to frames (T, H, W, 3) uint8; with `exact`, put the given pixels back.

    Raises:
        ConditionError: `exact` is set, and an input with multiplier 0 holds latents.
        NotFiniteError: the VAE decodes them to values that are not finite.
    """
    video = model.decode_ring(z_CFhw) if job.cyclic else model.decode(z_CFhw)
    return restore_pixels(video, job, model.backbone.geometry) if job.exact else video


def restore_pixels(video: np.ndarray, job: Job, geometry: Geometry) -> np.ndarray:
    """Return a copy of a job's video with the given pixels put back where an input has multiplier 0.

    Raises:
        ConditionError: such an input holds latents, which have no pixels.
    """
    video = video.copy()
    run = job.passes(geometry)[-1]
    latent_frames = len(run.timeline.starts)
    for condition in run.conditions:
        if not pinned_indices(condition):
            continue
        pixels = open_input(condition, job, geometry).pixels()
        take = resolve_positions(condition.take, geometry.latent_frames(len(pixels)), "latent frame")
        place = resolve_positions(condition.place, latent_frames, "position")
        for i in pinned_indices(condition):
            source = geometry.frames_of(take[i])
            target = video_frames_of(place[i], latent_frames, job, geometry)
            # A picture that fills several frames repeats; of several frames that become one, the last counts.
            repeated = [*source, *source[-1:] * (len(target) - len(source))]
            video[target] = pixels[repeated[-len(target) :]]
    return video


def describe_fault(video: np.ndarray) -> str:
    """Return a warning if a video (T, H, W, 3) shows nothing, else "": all its pixels have one colour."""
    lowest, highest = video.min((0, 1, 2)), video.max((0, 1, 2))
    if (highest - lowest).max() > CONSTANT:
        return ""
    return f"the whole video has one colour, {tuple(int(level) for level in lowest)}, as if the model had failed"


def measure_seams(video: np.ndarray, job: Job, geometry: Geometry) -> dict[str, float]:
    """Return the seam at each join of a job's video, by the number of the frame before it.

    A seam is the change from this frame to the next, divided by the mean change between all other neighbours.
    """
    changes, joins = frame_changes(video, job.cyclic), find_joins(job, geometry)
    others = np.delete(changes, joins)
    mean = max(float(others.mean()) if len(others) else 0.0, 1e-6)
    return {str(frame): round(float(changes[frame]) / mean, 3) for frame in joins}


def find_joins(job: Job, geometry: Geometry) -> list[int]:
    """Return the frames of a job's video after which a part ends.

    Parts are runs of given latent frames, segments (latent frames that start at the same step), and one turn of a loop.
    """
    run = job.passes(geometry)[-1]
    starts = run.timeline.starts
    frames = len(starts)
    staggered = len(set(starts)) == frames  # no two latent frames start together, so there are no segments
    given = {p for c in run.conditions for p in resolve_positions(c.place, frames, "position")}
    parts = [(frame in given, 0 if staggered else start) for frame, start in enumerate(starts)]
    ends = [frame for frame in range(frames - (not job.cyclic)) if parts[frame] != parts[(frame + 1) % frames]]
    wrap = {frames * geometry.temporal - 1} if job.cyclic else set()
    return sorted({video_frames_of(frame, frames, job, geometry)[-1] for frame in ends} | wrap)
