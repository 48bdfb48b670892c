"""The idea: one noise level per latent frame. Draw levels, add noise, form the target.

Shapes: sigma_BF in [0, 1], 1 = pure noise; latents x_BCFhw; levels_NF are the levels of a whole sampling run.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from pusa.diffusion.noise_schedules import linear_quadratic, shifted

# How levels are distributed: (shape, generator) -> levels of that shape. Listed in `DENSITIES` and `DensityName`.
Density = Callable[[tuple[int, ...], Generator], Tensor]
# How the frames of a clip share levels: (density, F, generator, number) -> sigma_F. In `LEVEL_SAMPLERS`,
# and with the range of its number in `pusa.manifest.training.LEVELS`.
LevelSampler = Callable[[Density, int, Generator, Any], Tensor]


def uniform(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Draw levels uniformly from [0, 1)."""
    return torch.rand(shape, generator=generator)


def logit_normal(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Draw levels sigmoid(n), n ~ N(0, 1): mostly in the middle of the range (Esser et al. 2024, arXiv:2403.03206)."""
    return torch.randn(shape, generator=generator).sigmoid()


DENSITIES: dict[str, Density] = {
    "linear_quadratic": linear_quadratic.density,
    "logit_normal": logit_normal,
    "shifted": shifted.density,
    "uniform": uniform,
}


def within(density: Density, low: float, high: float) -> Density:
    """Return the same density of only the levels in [low, high]: what is drawn outside is drawn again.

    So the levels inside keep their shares of each other. The generator's state depends on how many were outside.
    """

    def draw(shape: tuple[int, ...], generator: Generator) -> Tensor:
        sigma = density(shape, generator)
        while (outside := (sigma < low) | (sigma > high)).any():
            sigma = torch.where(outside, density(shape, generator), sigma)
        return sigma

    return draw


def independent(density: Density, frames: int, generator: Generator, _: None) -> Tensor:
    """Draw a level for each frame: the published Pusa training."""
    return density((frames,), generator)


def shared(density: Density, frames: int, generator: Generator, _: None) -> Tensor:
    """Draw one level for all frames: how base models are trained."""
    return density((1,), generator).expand(frames)


def ptss(density: Density, frames: int, generator: Generator, p: float) -> Tensor:
    """Draw independent levels with probability p, else one shared level (FVDM, Liu et al. 2024, arXiv:2410.03160)."""
    return density((frames if torch.rand((), generator=generator) < p else 1,), generator).expand(frames)


def chunked(density: Density, frames: int, generator: Generator, k: float) -> Tensor:
    """Draw one level for every k consecutive frames."""
    return density((-(-frames // int(k)),), generator).repeat_interleave(int(k))[:frames]


def clean_prefix(density: Density, frames: int, generator: Generator, _: None) -> Tensor:
    """Make the first k frames clean, k ~ U{0..F-1}, with one level for the others, as extension does."""
    sigma_F = density((1,), generator).repeat(frames)
    sigma_F[: int(torch.randint(frames, (), generator=generator))] = 0
    return sigma_F


LEVEL_SAMPLERS: dict[str, LevelSampler] = {
    "independent": independent,
    "shared": shared,
    "ptss": ptss,
    "chunked": chunked,
    "clean_prefix": clean_prefix,
}


def add_noise(x0_BCFhw: Tensor, noise_BCFhw: Tensor, sigma_BF: Tensor) -> Tensor:
    """Return z = (1 - sigma_f) * x0 + sigma_f * eps, frame by frame."""
    sigma = over_frames(sigma_BF)
    return (1 - sigma) * x0_BCFhw + sigma * noise_BCFhw


def target(x0_BCFhw: Tensor, noise_BCFhw: Tensor) -> Tensor:
    """Return the velocity x0 - eps, which a backbone's `predict` estimates."""
    return x0_BCFhw - noise_BCFhw


def over_frames(sigma_BF: Tensor) -> Tensor:
    """Reshape (B, F) or (F,) so that it multiplies (B, C, F, h, w) frame by frame."""
    return sigma_BF[..., None, :, None, None]
