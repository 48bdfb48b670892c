import pytest
import torch

from pusa.backbones.base import TextFeatures
from pusa.manifest import ModelSpec
from pusa.model import Model
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
    def stop(step, x0):
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(perfect, NOISE[None], levels(10, torch.ones(5)), stop)


def test_the_callback_sees_what_it_becomes():
    seen = {}
    sample(perfect, NOISE[None], levels(5, torch.ones(5)), seen.__setitem__)
    assert list(seen) == [0, 1, 2, 3, 4]
    for x0 in seen.values():
        torch.testing.assert_close(x0[0], X0, atol=1e-4, rtol=0)


def test_a_job_does_not_depend_on_what_shares_its_batch():
    """Two jobs of other noise, prompt, guidance-free levels and conditions, on the real small network."""
    model = Model(ModelSpec(weights="builtin:tiny-pusa"))
    prompts = ["a red circle moves left on a dark background", "a blue square"]
    noise = torch.randn(2, 12, 5, 8, 8, generator=torch.Generator().manual_seed(2))
    given = Given(torch.randn(12, 1, 8, 8), (0,), (0.2,))
    starts = [start_state(conditions, one) for conditions, one in zip(([], [given]), noise, strict=True)]
    jobs = [(*start, prompt) for start, prompt in zip(starts, prompts, strict=True)]

    def run(*jobs):
        starts, multipliers, prompts = zip(*jobs, strict=True)
        null = model.encode_text([""] * len(jobs))
        velocity = guided(model.backbone, model.transformer, model.encode_text(prompts), null, 1.5)
        return sample(velocity, torch.stack(starts), torch.stack([levels(4, m_F) for m_F in multipliers], 1))

    alone = [run(job)[0] for job in jobs]
    for order in ((0, 1), (1, 0)):
        together = run(*(jobs[i] for i in order))
        for i, z in zip(order, together, strict=True):
            torch.testing.assert_close(z, alone[i], atol=1e-4, rtol=0)
    assert torch.equal(run(jobs[1])[0], alone[1])
