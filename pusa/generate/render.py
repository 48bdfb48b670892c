"""One job put to a model: its latents sampled, pass by pass, and decoded."""

from collections.abc import Sequence
from itertools import count

import numpy as np
import torch
from torch import Generator, Tensor

from pusa.backbones.family import Geometry
from pusa.diffusion.noise_schedules import NOISE_SCHEDULES
from pusa.diffusion.sampler import OnStep, Predict, Velocity, delayed, guided, sample, start_state, windowed
from pusa.generate.conditions import give, open_source
from pusa.registry import find
from pusa.tasks.base import Condition, Job, Pass, resolve_positions, video_frames_of
from pusa.video.compare import frame_changes
from pusa.weights.model import Model


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
    latent_frames = len(job.passes(geometry)[-1].timeline.starts)
    for condition in conditions:
        if not pinned(condition):
            continue
        pixels = open_source(condition, job, geometry).pixels()
        take = resolve_positions(condition.take, geometry.latent_frames(len(pixels)), "latent frame")
        place = resolve_positions(condition.place, latent_frames, "position")
        for i in pinned(condition):
            given = geometry.frames_of(take[i])
            shown = video_frames_of(place[i], latent_frames, job, geometry)
            # A picture that is shown for several frames repeats; of several frames shown as one, the last counts.
            video[shown] = pixels[[*given, *given[-1:] * (len(shown) - len(given))][-len(shown) :]]
    return video


def joins(job: Job, geometry: Geometry) -> list[int]:
    """The frames of a job's video after which other latent frames follow than belong with them."""
    last = job.passes(geometry)[-1]
    starts = last.timeline.starts
    count = len(starts)
    given = {p for c in last.conditions for p in resolve_positions(c.place, count, "position")}
    parts = [(frame in given, 0 if _is_staircase(starts) else starts[frame]) for frame in range(count)]
    ends = [frame for frame in range(count - (not job.cyclic)) if parts[frame] != parts[(frame + 1) % count]]
    wrap = {count * geometry.temporal - 1} if job.cyclic else set()
    return sorted({video_frames_of(frame, count, job, geometry)[-1] for frame in ends} | wrap)


def seams_of(video: np.ndarray, job: Job, geometry: Geometry) -> dict[str, float]:
    """The seam at each join of a job's video, by the frame before it."""
    change, found = frame_changes(video, job.cyclic), joins(job, geometry)
    others = np.delete(change, found)
    usual = max(float(others.mean()) if len(others) else 0.0, 1e-6)
    return {str(frame): round(float(change[frame]) / usual, 3) for frame in found}


def _is_staircase(starts: Sequence[int]) -> bool:
    """Whether no two frames start together, so that there are no segments."""
    return len(set(starts)) == len(starts)


def total_steps(job: Job, geometry: Geometry) -> int:
    """Calls of the network that a job takes."""
    return sum(job.steps + run.timeline.delay for run in job.passes(geometry))


def sample_job(job: Job, model: Model, on_step: OnStep = lambda step, x0: None) -> Tensor:
    """The latents (C, F, h, w) of one job, in the transformer's space."""
    velocity = _velocity(job, model)
    generator = Generator().manual_seed(job.seed)
    z_CFhw = None
    for run in job.passes(model.backbone.geometry):
        z_CFhw = _sample_pass(run, z_CFhw, job, model, velocity, generator, on_step)
    assert z_CFhw is not None
    return z_CFhw


def _velocity(job: Job, model: Model) -> Velocity:
    """The transformer is looked up at each call: with `offload`, reading what is given may have moved it away."""
    text = model.encode_text([job.prompt])
    null = model.encode_text([job.negative_prompt]) if job.guidance != 1 else text
    predict: Predict = lambda z, sigma, words: model.backbone.predict(model.transformer, z, sigma, words)  # noqa: E731
    return guided(predict, text, null, job.guidance)


def _sample_pass(
    run: Pass,
    before_CFhw: Tensor | None,
    job: Job,
    model: Model,
    velocity: Velocity,
    generator: Generator,
    on_step: OnStep,
) -> Tensor:
    channels, _, height, width = model.backbone.geometry.latent_shape(job.width, job.height, job.num_frames)
    frames = len(run.timeline.starts)
    given = [give(condition, job, model, frames, before_CFhw) for condition in run.conditions]
    noise_CFhw = torch.randn(channels, frames, height, width, generator=generator)
    unknown_C1hw = torch.randn(channels, 1, height, width, generator=generator)
    start_CFhw, multipliers_F = start_state(given, noise_CFhw)
    levels_NF = find(NOISE_SCHEDULES, job.noise_schedule, "noise schedule")(job.steps, multipliers_F)
    velocity = windowed(velocity, map(run.timeline.windows, count()), unknown_C1hw)
    return sample(velocity, start_CFhw[None].to(model.device), delayed(levels_NF, run.timeline.starts), on_step)[0].cpu()


def decode_job(job: Job, model: Model, z_CFhw: Tensor) -> np.ndarray:
    """The frames (T, H, W, 3) uint8 of a job's latents.

    Raises:
        ConditionError: `exact` wants pixels that there are not.
    """
    video = model.decode_ring(z_CFhw) if job.cyclic else model.decode(z_CFhw)
    if not job.exact:
        return video
    geometry = model.backbone.geometry
    return paste(video, job.passes(geometry)[-1].conditions, job, geometry)
