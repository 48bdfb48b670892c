"""Latents between the VAE and the transformer: both spaces, there and back."""

import pytest
import torch

from pusa.diffusion.latent_spaces import LATENT_SPACES
from pusa.diffusion.noise_schedules.linear_quadratic import levels
from pusa.diffusion.sampler import Given, sample, start_state
from pusa.diffusion.timesteps import add_noise

MEAN, STD = torch.randn(12, 1, 1, 1), torch.rand(12, 1, 1, 1) + 0.5
X = torch.randn(12, 5, 2, 2) * 2 + 1  # what a VAE gives
NOISE = torch.randn(12, 5, 2, 2)


def space(name):
    return LATENT_SPACES[name](MEAN, STD)


def test_entering_and_leaving_the_dit_space_changes_nothing():
    z = space("dit").enter(X)
    torch.testing.assert_close(z, (X - MEAN) / STD)
    torch.testing.assert_close(space("dit").leave(z), X)
    assert torch.equal(space("dit").target(z, NOISE), z - NOISE)


def test_the_vae_space_is_as_published():
    z = space("vae").enter(X)
    assert torch.equal(z, X)
    torch.testing.assert_close(space("vae").leave(z), X * STD + MEAN)
    torch.testing.assert_close(space("vae").target(z, NOISE), (X - NOISE - MEAN) / STD)


@pytest.mark.parametrize("name, decoded", [("dit", X), ("vae", X * STD + MEAN)])
def test_a_frame_with_multiplier_0_decodes_to_itself_in_dit_and_as_published_in_vae(name, decoded):
    there = space(name)
    given = Given(there.enter(X)[:, [0, 3]], (0, 3), (0.0, 0.0))
    start, m_F = start_state([given], NOISE)
    z = sample(lambda z, sigma: torch.randn_like(z), start[None], levels(6, m_F))[0]
    torch.testing.assert_close(there.leave(z)[:, [0, 3]], decoded[:, [0, 3]])


@pytest.mark.parametrize("name", LATENT_SPACES)
def test_the_training_target_leads_from_noise_to_the_decoded_latents(name):
    """A network that has learnt the target exactly, followed in one step from pure noise."""
    there = space(name)
    x0 = there.enter(X)
    z = add_noise(x0, NOISE, torch.ones(5)) + there.target(x0, NOISE)
    expected = x0 if name == "dit" else NOISE + (X - NOISE - MEAN) / STD
    torch.testing.assert_close(z, expected)
