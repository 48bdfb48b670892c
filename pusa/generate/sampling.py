"""Sample the latents of one job, pass by pass."""

from collections.abc import Callable
from itertools import count

import torch
from torch import Tensor

from pusa.backbones.family import Geometry
from pusa.diffusion.noise_schedules import find_noise_schedule
from pusa.diffusion.sampler import OnStep, Predict, TextFeatures, delayed, guided, sample, start_state, windowed
from pusa.diffusion.seeds import seeded
from pusa.generate.conditions import encode_condition
from pusa.generate.latents import require_finite
from pusa.tasks.base import Job
from pusa.weights.model import Model


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
