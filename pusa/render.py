"""One job put to a model: its latents sampled, pass by pass, and decoded."""

from itertools import count

import numpy as np
import torch
from torch import Generator, Tensor

from pusa.backbones.geometry import Geometry
from pusa.conditions import give
from pusa.exact import paste
from pusa.model import Model
from pusa.noise_schedules import NOISE_SCHEDULES
from pusa.sampler import OnStep, Velocity, delayed, guided, sample, start_state, windowed
from pusa.tables import find
from pusa.tasks.base import Job, Pass


def total_steps(job: Job, geometry: Geometry) -> int:
    """Calls of the network that a job takes."""
    return sum(job.steps + run.course.delay for run in job.passes(geometry))


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
    return lambda z, sigma: guided(model.backbone, model.transformer, text, null, job.guidance)(z, sigma)


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
    frames = len(run.course.starts)
    given = [give(condition, job, model, frames, before_CFhw) for condition in run.conditions]
    noise_CFhw = torch.randn(channels, frames, height, width, generator=generator)
    unknown_C1hw = torch.randn(channels, 1, height, width, generator=generator)
    start_CFhw, multipliers_F = start_state(given, noise_CFhw)
    levels_NF = find(NOISE_SCHEDULES, job.noise_schedule, "noise schedule")(job.steps, multipliers_F)
    velocity = windowed(velocity, map(run.course.windows, count()), unknown_C1hw)
    return sample(velocity, start_CFhw[None].to(model.device), delayed(levels_NF, run.course.starts), on_step)[0].cpu()


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
