"""Uniform steps, shifted towards noise; and the density of levels that Pusa V1.0 was trained with.

Shapes: F latent frames, N steps.
"""

import torch
from torch import Generator, Tensor

SHIFT = 5.0  # Pusa V1.0's
GRID = 1000  # points of the training density


def sigmas(steps: int, shift: float = SHIFT) -> Tensor:
    """Return N + 1 levels sigma = shift * u / (1 + (shift - 1) * u), u from 1 to 0 (Esser et al. 2024)."""
    u = torch.linspace(1, 0, steps + 1)
    return shift * u / (1 + (shift - 1) * u)


def levels(steps: int, multipliers_F: Tensor, number: float = SHIFT) -> Tensor:
    """Return levels (N + 1, F): every frame follows the schedule with shift `number`, scaled by its own multiplier."""
    return sigmas(steps, number)[:, None] * multipliers_F


def density(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Draw levels as published Pusa V1.0 does: points of the shift-5 grid of 1000, without the end point 0."""
    u = torch.randint(1, GRID + 1, shape, generator=generator) / GRID
    return 5 * u / (1 + 4 * u)
