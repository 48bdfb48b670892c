"""The idea: one noise level per latent frame. Draw levels, add noise, form the target.

Shapes: sigma_BF in [0, 1], 1 = pure noise; latents x_BCFhw; levels_NF are the levels of a whole sampling run.
"""

from collections.abc import Callable

import torch
from torch import Generator, Tensor

# Where levels lie: (shape, generator) -> levels of that shape.
Density = Callable[[tuple[int, ...], Generator], Tensor]
# How the frames of a clip share them: (density, B, F, generator) -> sigma_BF. One line each in the table.
LevelSampler = Callable[[Density, int, int, Generator], Tensor]


def uniform(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Levels uniform in [0, 1)."""
    return torch.rand(shape, generator=generator)


def logit_normal(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Levels sigmoid(n), n ~ N(0, 1): the middle of the range more often (Esser et al. 2024, arXiv:2403.03206)."""
    return torch.randn(shape, generator=generator).sigmoid()


def linear_quadratic(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """The published Pusa V0.5 density: an index ~ U{0..998} into Mochi's linear-quadratic schedule of 1000 steps."""
    from pusa.noise_schedules.linear_quadratic import sigmas

    return sigmas(1000)[torch.randint(0, 999, shape, generator=generator)]


DENSITIES: dict[str, Density] = {
    "linear_quadratic": linear_quadratic,
    "logit_normal": logit_normal,
    "uniform": uniform,
}

LEVEL_SAMPLERS: dict[str, LevelSampler] = {
    "independent": lambda density, batch, frames, generator: density((batch, frames), generator),
    "shared": lambda density, batch, frames, generator: density((batch, 1), generator).expand(batch, frames),
}


def add_noise(x0_BCFhw: Tensor, noise_BCFhw: Tensor, sigma_BF: Tensor) -> Tensor:
    """z = (1 - sigma_f) * x0 + sigma_f * eps, frame by frame."""
    sigma = over_frames(sigma_BF)
    return (1 - sigma) * x0_BCFhw + sigma * noise_BCFhw


def target(x0_BCFhw: Tensor, noise_BCFhw: Tensor) -> Tensor:
    """The velocity x0 - eps that a backbone's `predict` gives."""
    return x0_BCFhw - noise_BCFhw


def over_frames(sigma_BF: Tensor) -> Tensor:
    """(B, F) or (F,) -> something that multiplies (B, C, F, h, w) frame by frame."""
    return sigma_BF[..., None, :, None, None]
