import pytest
import torch

from pusa.diffusion.timesteps import DENSITIES
from pusa.finetune.loss import WEIGHTINGS, frame_errors, gaussian, sum_by_band, weighted
from pusa.manifest.models import FinetuneManifest


def levels() -> torch.Tensor:
    return torch.rand(8, 6, generator=torch.Generator().manual_seed(0))


def test_without_weights_it_is_the_mean_square_error():
    velocity, target = torch.randn(8, 12, 6, 4, 4), torch.randn(8, 12, 6, 4, 4)
    error_BF = frame_errors(velocity, target)
    torch.testing.assert_close(weighted(error_BF, levels(), "none"), torch.nn.functional.mse_loss(velocity, target))
    torch.testing.assert_close(error_BF[3, 2], (velocity - target)[3, :, 2].square().mean())


def test_the_gaussian_weight_is_the_published_one():
    """As V1.0's scheduler computes it: over its 1000 shifted timesteps, with sum 1000."""
    u = torch.linspace(1, 0, 1001, dtype=torch.float64)[:-1]
    t = 1000 * 5 * u / (1 + 4 * u)
    bell = torch.exp(-2 * ((t - 500) / 1000) ** 2)
    expected = (bell - bell.min()) * (1000 / (bell - bell.min()).sum())
    torch.testing.assert_close(gaussian(t / 1000), expected)
    assert expected.argmin() == 0


def test_weights_apply_to_each_frame_or_by_their_mean():
    error_BF = torch.rand(8, 6)
    by_frame = (error_BF * gaussian(levels())).mean()
    of_mean = (error_BF.mean(1) * gaussian(levels()).mean(1)).mean()
    torch.testing.assert_close(weighted(error_BF, levels(), "gaussian"), by_frame)
    torch.testing.assert_close(weighted(error_BF, levels(), "gaussian_of_mean"), of_mean)
    assert (by_frame - of_mean).abs() > 1e-4


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_have_mean_one_over_their_grid(weighting):
    sigma_BF = DENSITIES["shifted"]((400, 100), torch.Generator().manual_seed(0))
    assert WEIGHTINGS[weighting](sigma_BF).mean() == pytest.approx(1, abs=0.02)


def test_errors_are_summed_by_the_tenth_of_their_level():
    sigma_BF = torch.tensor([[0.0, 0.05, 0.95, 1.0, 0.35]])
    error_BF = torch.tensor([[1.0, 2.0, 3.0, 5.0, 7.0]])
    sums, counts = sum_by_band(error_BF, sigma_BF)
    assert sums.tolist() == [3, 0, 0, 7, 0, 0, 0, 0, 0, 8]
    assert counts.tolist() == [2, 0, 0, 1, 0, 0, 0, 0, 0, 2]


def test_the_manifest_allows_exactly_the_known_weightings():
    assert set(FinetuneManifest.model_fields["weighting"].annotation.__args__) == set(WEIGHTINGS)
