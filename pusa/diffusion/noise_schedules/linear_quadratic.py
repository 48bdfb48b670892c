"""Mochi's schedule: slow and linear down to 1 - threshold, then quadratic to 0."""

import torch
from torch import Tensor

THRESHOLD = 0.025


def sigmas(steps: int, threshold: float = THRESHOLD) -> Tensor:
    """N + 1 levels from 1 to 0, the end point included.

    The first N // 2 steps are linear to 1 - threshold; the rest follow the parabola that meets that line with its
    slope and ends at 0 (genmo/mochi, `linear_quadratic_schedule`).
    """
    linear = steps // 2
    if linear == 0:
        return torch.linspace(1, 0, steps + 1)
    slope = threshold / linear
    left = torch.arange(linear) * slope
    i = torch.arange(steps - linear + 1, dtype=torch.float64)
    rest = steps - linear
    quadratic = (1 - threshold - slope * rest) / rest**2
    right = threshold + slope * i + quadratic * i**2
    return (1 - torch.cat([left.double(), right])).float()


def levels(steps: int, multipliers_F: Tensor) -> Tensor:
    """(N + 1, F): every frame follows the schedule, scaled by its own multiplier."""
    return sigmas(steps)[:, None] * multipliers_F
