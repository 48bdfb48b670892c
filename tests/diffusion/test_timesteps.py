"""Levels for training: how they are sampled, their densities, and the noise that they add."""

import pytest
import torch

from pusa.diffusion.timesteps import DENSITIES, LEVEL_SAMPLERS, add_noise, target
from pusa.manifest.models import FinetuneManifest
from pusa.manifest.training import LEVELS, parse_levels

FRAMES = 6


def draws(levels: str, density: str = "uniform", count: int = 512) -> torch.Tensor:
    """(count, F): clips of a level sampler, as a manifest names it."""
    name, number = parse_levels(levels)
    generator = torch.Generator().manual_seed(0)
    rows = [LEVEL_SAMPLERS[name](DENSITIES[density], FRAMES, generator, number) for _ in range(count)]
    return torch.stack(rows)


def distinct(sigma_BF: torch.Tensor) -> list[int]:
    return [len(row.unique()) for row in sigma_BF]


def test_a_manifest_may_name_every_level_sampler_and_density():
    assert set(LEVELS) == set(LEVEL_SAMPLERS)
    assert set(FinetuneManifest.model_fields["density"].annotation.__args__) == set(DENSITIES)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("levels", LEVEL_SAMPLERS)
def test_levels_are_in_range_and_reproducible(levels, density):
    sigma_BF = draws(levels, density, 64)
    assert sigma_BF.shape == (64, FRAMES)
    assert sigma_BF.min() >= 0 and sigma_BF.max() <= 1
    assert torch.equal(sigma_BF, draws(levels, density, 64))


def test_independent_levels_differ_between_frames_and_shared_do_not():
    independent = draws("independent")
    assert torch.corrcoef(independent.T)[0, 1].abs() < 0.15
    shared = draws("shared")
    assert (shared == shared[:, :1]).all() and shared[:, 0].std() > 0.2


@pytest.mark.parametrize("probability", [0, 0.2, 1])
def test_ptss_is_independent_with_its_probability_and_shared_otherwise(probability):
    counts = distinct(draws(f"ptss({probability})", count=2000))
    assert set(counts) <= {1, FRAMES}
    assert counts.count(FRAMES) / len(counts) == pytest.approx(probability, abs=0.03)


@pytest.mark.parametrize("size", [1, 2, 4, 6, 9])
def test_chunks_share_a_level(size):
    sigma_BF = draws(f"chunked({size})")
    chunks = sigma_BF.split(size, 1)
    assert all((chunk == chunk[:, :1]).all() for chunk in chunks)
    assert set(distinct(sigma_BF)) == {len(chunks)}


def test_a_clean_prefix_has_any_length_but_the_whole_clip():
    sigma_BF = draws("clean_prefix", count=3000)
    clean_B = (sigma_BF == 0).sum(1)
    assert (sigma_BF.sort(1).values == sigma_BF).all() and set(distinct(sigma_BF)) == {1, 2}
    assert torch.bincount(clean_B).tolist() == pytest.approx([500] * FRAMES, abs=90)


@pytest.mark.parametrize("levels, why", [
    ("ptss(2)", "numbers from 0 to 1"), ("chunked(1.5)", "whole numbers from 1"), ("shared(3)", "has no number"),
    ("indepndent", "unknown level sampler 'indepndent'; allowed are independent"), ("ptss(1.2.3)", "not a number"),
])  # fmt: skip
def test_unknown_levels_are_refused(levels, why):
    with pytest.raises(ValueError, match=why):
        parse_levels(levels)


def test_the_number_of_a_level_sampler_may_be_left_out():
    assert (parse_levels("ptss"), parse_levels("chunked( 3 )")) == (("ptss", 0.2), ("chunked", 3))


@pytest.mark.parametrize("name", [name for name, number in LEVELS.items() if number])
def test_a_number_must_be_within_its_bounds(name):
    bounds = LEVELS[name]
    for number in (bounds.default, bounds.minimum, bounds.maximum):
        assert parse_levels(f"{name}({number})") == (name, number)
    for number in (bounds.maximum + 1, *([bounds.minimum + 0.5] if bounds.is_whole else [])):
        with pytest.raises(ValueError, match=f"from {bounds.minimum} to {bounds.maximum}"):
            parse_levels(f"{name}({number})")


def test_linear_quadratic_density_is_the_published_grid():
    drawn = DENSITIES["linear_quadratic"]((20_000,), torch.Generator().manual_seed(0))
    assert drawn.max() == 1 and drawn.min() > 0  # index 999, the last but one point, and the end point are left out
    assert (drawn >= 0.975).float().mean() == pytest.approx(0.5, abs=0.02)


def test_shifted_density_is_the_published_grid():
    drawn = DENSITIES["shifted"]((50_000,), torch.Generator().manual_seed(0))
    assert drawn.max() == 1 and drawn.min() == pytest.approx(0.005 / 1.004)
    assert len(drawn.unique()) == 1000
    assert drawn.median() == pytest.approx(5 / 6, abs=0.01)


def test_noise_and_target_are_frame_by_frame():
    x0, noise = torch.randn(2, 12, 3, 4, 4), torch.randn(2, 12, 3, 4, 4)
    sigma_BF = torch.tensor([[0.0, 0.5, 1.0], [1.0, 0.25, 0.0]])
    z = add_noise(x0, noise, sigma_BF)
    assert torch.equal(z[0, :, 0], x0[0, :, 0]) and torch.equal(z[0, :, 2], noise[0, :, 2])
    torch.testing.assert_close(z[1, :, 1], 0.75 * x0[1, :, 1] + 0.25 * noise[1, :, 1])
    # Along the velocity, any level leads back to the clean clip.
    torch.testing.assert_close(z + sigma_BF[:, None, :, None, None] * target(x0, noise), x0)
