"""Wan's schedule: uniform steps, shifted towards noise."""

import torch
from torch import Tensor

SHIFT = 5.0


def sigmas(steps: int, shift: float = SHIFT) -> Tensor:
    """N + 1 levels sigma = shift * u / (1 + (shift - 1) * u), u from 1 to 0."""
    u = torch.linspace(1, 0, steps + 1)
    return shift * u / (1 + (shift - 1) * u)


def levels(steps: int, multipliers_F: Tensor) -> Tensor:
    """(N + 1, F): every frame follows the schedule, scaled by its own multiplier."""
    return sigmas(steps)[:, None] * multipliers_F
