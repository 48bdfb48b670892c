import pytest
import torch

from pusa.timesteps import DENSITIES, LEVEL_SAMPLERS, add_noise, target


def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("levels", LEVEL_SAMPLERS)
def test_levels_are_in_range_and_reproducible(levels, density):
    draw = lambda: LEVEL_SAMPLERS[levels](DENSITIES[density], 64, 6, generator())  # noqa: E731
    sigma_BF = draw()
    assert sigma_BF.shape == (64, 6)
    assert sigma_BF.min() >= 0 and sigma_BF.max() <= 1
    assert torch.equal(sigma_BF, draw())


def test_independent_levels_differ_between_frames_and_shared_do_not():
    uniform = DENSITIES["uniform"]
    independent = LEVEL_SAMPLERS["independent"](uniform, 512, 6, generator())
    assert torch.corrcoef(independent.T)[0, 1].abs() < 0.15
    shared = LEVEL_SAMPLERS["shared"](uniform, 512, 6, generator())
    assert (shared == shared[:, :1]).all() and shared[:, 0].std() > 0.2


def test_linear_quadratic_density_is_the_published_grid():
    drawn = DENSITIES["linear_quadratic"]((20_000,), generator())
    assert drawn.max() == 1 and drawn.min() > 0  # index 999, the last but one point, and the end point are left out
    assert (drawn >= 0.975).float().mean() == pytest.approx(0.5, abs=0.02)


def test_noise_and_target_are_frame_by_frame():
    x0, noise = torch.randn(2, 12, 3, 4, 4), torch.randn(2, 12, 3, 4, 4)
    sigma_BF = torch.tensor([[0.0, 0.5, 1.0], [1.0, 0.25, 0.0]])
    z = add_noise(x0, noise, sigma_BF)
    assert torch.equal(z[0, :, 0], x0[0, :, 0]) and torch.equal(z[0, :, 2], noise[0, :, 2])
    torch.testing.assert_close(z[1, :, 1], 0.75 * x0[1, :, 1] + 0.25 * noise[1, :, 1])
    # Along the velocity, any level leads back to the clean clip.
    torch.testing.assert_close(z + sigma_BF[:, None, :, None, None] * target(x0, noise), x0)
