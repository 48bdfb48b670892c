"""Make the video of one job: sample its latents pass by pass, decode them, measure the seams."""

from collections.abc import Callable
from itertools import count

import numpy as np
import torch
from torch import Tensor

from pusa.backbones.family import Geometry
from pusa.diffusion.noise_schedules import find_noise_schedule
from pusa.diffusion.sampler import OnStep, Predict, TextFeatures, delayed, guided, sample, start_state, windowed
from pusa.diffusion.seeds import seeded
from pusa.generate.conditions import encode_condition, open_input, pinned_indices
from pusa.generate.latents import require_finite
from pusa.tasks.base import Job, resolve_positions, video_frames_of
from pusa.video.compare import frame_changes
from pusa.weights.model import Model

CONSTANT = 2  # levels of 255 by which the pixels of a video may differ that shows nothing


def total_steps(job: Job, geometry: Geometry) -> int:
    """Return the number of steps over all passes of a job, as `on_step` of `sample_job` counts them."""
    return sum(job.steps + run.timeline.delay for run in job.passes(geometry))


def sample_job(
    job: Job,
    model: Model,
    on_step: OnStep = lambda step, x0: None,
    after_reading: Callable[[], None] = lambda: None,
) -> Tensor:
    """Sample one job, pass by pass, and return its latents (C, F, h, w) in the transformer's space.

    Args:
        job: the job.
        model: the model.
        on_step: called after each denoising step, as by `sample`.
        after_reading: called in each pass once its inputs were read, before the steps.

    Raises:
        MediaError: an input cannot be read.
        ConditionError: an input does not fit the job.
        NotFiniteError: a part of the model computes values that are not finite; the message names the step.
    """
    geometry, schedule = model.backbone.geometry, find_noise_schedule(job.noise_schedule)
    text = _encode_prompt(job.prompt, "prompt", model)
    null_text = _encode_prompt(job.negative_prompt, "negative_prompt", model) if job.guidance != 1 else text
    # `model.transformer` is read at each call: with `offload`, encoding an input may have moved it off the device.
    predict: Predict = lambda z, sigma, features: model.backbone.predict(model.transformer, z, sigma, features)  # noqa: E731
    velocity = guided(predict, text, null_text, job.guidance)

    generator = seeded(job.seed)
    channels, _, height, width = geometry.latent_shape(job.width, job.height, job.num_frames)
    z_CFhw, done = None, count(1)

    def after_step(step: int, x0_BCFhw: Tensor) -> None:
        require_finite(x0_BCFhw, f"the latents after denoising step {next(done)} of {total_steps(job, geometry)}")
        on_step(step, x0_BCFhw)

    for run in job.passes(geometry):
        starts = run.timeline.starts
        given = [encode_condition(condition, job, model, len(starts), z_CFhw) for condition in run.conditions]
        after_reading()
        noise_CFhw = torch.randn(channels, len(starts), height, width, generator=generator)
        unknown_C1hw = torch.randn(channels, 1, height, width, generator=generator)
        start_CFhw, multipliers_F = start_state(given, noise_CFhw)
        levels_NF = delayed(schedule(job.steps, multipliers_F), starts)
        windowed_velocity = windowed(velocity, map(run.timeline.windows, count()), unknown_C1hw)
        z_CFhw = sample(windowed_velocity, start_CFhw[None].to(model.device), levels_NF, after_step)[0].cpu()
    assert z_CFhw is not None
    require_finite(z_CFhw, "the sampled latents")
    return z_CFhw


def _encode_prompt(prompt: str, name: str, model: Model) -> TextFeatures:
    text = model.encode_text([prompt])
    require_finite(text.features, f"the text features of {name}")
    return text


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
