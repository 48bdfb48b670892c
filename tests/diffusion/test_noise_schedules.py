"""Noise schedules: levels from the multipliers down to zero, and the published numbers."""

import pytest
import torch
from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule

from pusa.diffusion.noise_schedules import NOISE_SCHEDULES
from pusa.diffusion.noise_schedules.linear_quadratic import sigmas
from pusa.registry import find

M_F = torch.tensor([0.0, 0.3, 1.0])


@pytest.mark.parametrize("name", NOISE_SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 30, 64])
def test_levels_fall_from_the_multipliers_to_zero(name, steps):
    levels_NF = find(NOISE_SCHEDULES, name, "noise schedule")(steps, M_F)
    assert levels_NF.shape == (steps + 1, 3)
    torch.testing.assert_close(levels_NF[0], M_F)
    assert levels_NF[-1].abs().max() < 1e-6
    assert (levels_NF.diff(dim=0)[:, 1:] < 0).all() and (levels_NF[:, 0] == 0).all()


@pytest.mark.parametrize("steps", [2, 7, 30, 64])
def test_linear_quadratic_is_the_schedule_of_mochi(steps):
    theirs = torch.tensor(linear_quadratic_schedule(steps, 0.025))
    torch.testing.assert_close(sigmas(steps)[:-1], theirs, atol=1e-6, rtol=0)


def test_shifted_is_the_schedule_of_wan():
    from pusa.diffusion.noise_schedules.shifted import sigmas as shifted

    assert shifted(2)[1].item() == pytest.approx(5 * 0.5 / (1 + 4 * 0.5))
