"""Uniform steps, shifted towards noise; and the density of levels that Pusa V1.0 was trained with.

Shapes: F latent frames, N steps.
"""

import torch
from torch import Generator, Tensor

SHIFT = 5.0  # Pusa V1.0's
GRID = 1000  # points of the training density


def shift_levels(u: Tensor, shift: float = SHIFT) -> Tensor:
    """Return shift * u / (1 + (shift - 1) * u), which moves levels u in [0, 1] towards noise (Esser et al. 2024)."""
    return shift * u / (1 + (shift - 1) * u)


def sigmas(steps: int, shift: float = SHIFT) -> Tensor:
    """Return N + 1 levels: uniform ones from 1 to 0, shifted."""
    return shift_levels(torch.linspace(1, 0, steps + 1), shift)


def levels(steps: int, multipliers_F: Tensor, number: float = SHIFT) -> Tensor:
    """Return levels (N + 1, F): every frame follows the schedule with shift `number`, scaled by its own multiplier."""
    return sigmas(steps, number)[:, None] * multipliers_F


def density(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Draw levels as published Pusa V1.0 does: points of the shift-5 grid of 1000, without the end point 0."""
    return shift_levels(torch.randint(1, GRID + 1, shape, generator=generator) / GRID)
