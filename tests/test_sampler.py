import pytest
import torch

from pusa.backbones.base import TextFeatures
from pusa.noise_schedules.linear_quadratic import levels
from pusa.sampler import Given, guided, sample, start_state

SHAPE = (12, 5, 2, 2)
X0 = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
NOISE = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


def perfect(z, sigma_BF):
    """The velocity of someone who knows X0: from any level it leads straight there."""
    sigma = sigma_BF[:, None, :, None, None].clamp(min=1e-6)
    return (X0 - z) / sigma


@pytest.mark.parametrize("steps", [1, 4, 30])
def test_a_perfect_velocity_arrives(steps):
    start, m_F = start_state([], NOISE)
    torch.testing.assert_close(sample(perfect, start[None], levels(steps, m_F))[0], X0, atol=1e-4, rtol=0)


def test_a_frame_with_multiplier_0_is_kept_exactly_and_others_start_as_the_formula_says():
    given = [Given(X0[:, [1, 3]], (1, 3), (0.0, 0.4))]
    start, m_F = start_state(given, NOISE)
    assert m_F.tolist() == pytest.approx([1, 0, 1, 0.4, 1])
    assert torch.equal(start[:, 1], X0[:, 1]) and torch.equal(start[:, 0], NOISE[:, 0])
    torch.testing.assert_close(start[:, 3], 0.6 * X0[:, 3] + 0.4 * NOISE[:, 3])
    wild = sample(lambda z, sigma: torch.randn_like(z), start[None], levels(8, m_F))[0]
    assert torch.equal(wild[:, 1], X0[:, 1])
    assert not torch.equal(wild[:, 3], X0[:, 3])


def test_the_network_is_told_each_frames_level():
    seen = []
    _, m_F = start_state([Given(X0[:, :1], (2,), (0.5,))], NOISE)
    matrix = levels(4, m_F)
    sample(lambda z, sigma: seen.append(sigma) or torch.zeros_like(z), NOISE[None], matrix)
    assert torch.equal(torch.cat(seen), matrix[:-1])


class Recorder:
    """A backbone whose velocity is the text's mean, and which counts its samples."""

    def __init__(self):
        self.batches = []

    def predict(self, transformer, z, sigma, text):
        self.batches.append(len(z))
        return torch.ones_like(z) * text.features.mean((1, 2)).view(-1, 1, 1, 1, 1)


def test_guidance_extrapolates_and_1_needs_no_null_pass():
    text, null = (TextFeatures(torch.full((1, 3, 4), v), torch.ones(1, 3, dtype=torch.bool)) for v in (2.0, 1.0))
    z, sigma = NOISE[None], torch.ones(1, 5)
    backbone = Recorder()
    assert guided(backbone, None, text, null, 4.5)(z, sigma).unique().item() == 5.5
    assert guided(backbone, None, text, null, 1)(z, sigma).unique().item() == 2
    assert backbone.batches == [2, 1]


def test_raising_in_the_callback_cancels():
    def stop(step):
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(perfect, NOISE[None], levels(10, torch.ones(5)), stop)
