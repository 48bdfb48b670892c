"""The idea: one noise level per latent frame. Draw levels, add noise, form the target.

Shapes: sigma_BF in [0, 1], 1 = pure noise; latents x_BCFhw; levels_NF are the levels of a whole sampling run.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

# Where levels lie: (shape, generator) -> levels of that shape.
Density = Callable[[tuple[int, ...], Generator], Tensor]
# How the frames of a clip share them: (density, F, generator, the number given) -> sigma_F. One line each in the table.
LevelSampler = Callable[[Density, int, Generator, Any], Tensor]


def uniform(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Levels uniform in [0, 1)."""
    return torch.rand(shape, generator=generator)


def logit_normal(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Levels sigmoid(n), n ~ N(0, 1): the middle of the range more often (Esser et al. 2024, arXiv:2403.03206)."""
    return torch.randn(shape, generator=generator).sigmoid()


def linear_quadratic(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """The published Pusa V0.5 density: an index ~ U{0..998} into Mochi's linear-quadratic schedule of 1000 steps."""
    from pusa.diffusion.noise_schedules.linear_quadratic import sigmas

    return sigmas(1000)[torch.randint(0, 999, shape, generator=generator)]


def shifted(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """The published Pusa V1.0 density: a point of Wan's grid of 1000, shifted by 5, the end point left out."""
    u = torch.randint(1, 1001, shape, generator=generator) / 1000
    return 5 * u / (1 + 4 * u)


DENSITIES: dict[str, Density] = {
    "linear_quadratic": linear_quadratic,
    "logit_normal": logit_normal,
    "shifted": shifted,
    "uniform": uniform,
}


def clean_prefix(density: Density, frames: int, generator: Generator, _: None) -> Tensor:
    """The first k frames clean, k ~ U{0..F-1}, the others at one level: what extension and image-to-video ask for."""
    sigma_F = density((1,), generator).repeat(frames)
    sigma_F[: int(torch.randint(frames, (), generator=generator))] = 0
    return sigma_F


LEVEL_SAMPLERS: dict[str, LevelSampler] = {
    "independent": lambda density, frames, generator, _: density((frames,), generator),
    "shared": lambda density, frames, generator, _: density((1,), generator).expand(frames),
    # FVDM's probabilistic time-step sampling, Liu et al. 2024, arXiv:2410.03160
    "ptss": lambda density, frames, generator, p: density(
        (frames if torch.rand((), generator=generator) < p else 1,), generator
    ).expand(frames),
    "chunked": lambda density, frames, generator, k: density((-(-frames // int(k)),), generator).repeat_interleave(
        int(k)
    )[:frames],
    "clean_prefix": clean_prefix,
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
