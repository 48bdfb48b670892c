"""The denoising loop: given frames, delays, windows and guidance."""

from functools import partial
from itertools import count

import pytest
import torch

from pusa.diffusion.noise_schedules.linear_quadratic import levels
from pusa.diffusion.sampler import (
    Given,
    TextFeatures,
    delayed,
    denoise,
    guided,
    sample,
    start_state,
    windowed,
    within_memory,
)
from pusa.diffusion.windows import ring, segments, whole
from pusa.manifest.models import ModelSpec
from pusa.weights.model import Model

SHAPE = (12, 5, 2, 2)
X0 = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
NOISE = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


def perfect(z, sigma_BF):
    """Return the velocity that leads from any level straight to X0."""
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


def test_the_network_gets_the_level_of_each_frame():
    seen = []
    _, m_F = start_state([Given(X0[:, :1], (2,), (0.5,))], NOISE)
    matrix = levels(4, m_F)
    sample(lambda z, sigma: seen.append(sigma) or torch.zeros_like(z), NOISE[None], matrix)
    assert torch.equal(torch.cat(seen), matrix[:-1])


class Recorder:
    """A network whose velocity is the mean of the text, and which records the size of each batch."""

    def __init__(self):
        self.batches = []

    def __call__(self, z, sigma, text):
        self.batches.append(len(z))
        return torch.ones_like(z) * text.features.mean((1, 2)).view(-1, 1, 1, 1, 1)


def test_a_delayed_frame_stays_at_its_first_level_before_and_at_0_after_its_steps():
    base = levels(4, torch.tensor([1.0, 0.5, 1.0]))
    matrix = delayed(base, (0, 2, 6))
    assert matrix.shape == (11, 3)
    for frame, start in enumerate((0, 2, 6)):
        assert torch.equal(matrix[start : start + 5, frame], base[:, frame])
        assert (matrix[:start, frame] == base[0, frame]).all() and (matrix[start + 4 :, frame] == 0).all()
    assert torch.equal(delayed(base, (0, 0, 0)), base)


def knows_its_window(clip):
    """Return a velocity that leads to the frames of `clip` in its window, of which the first may be unknown."""
    seen = []

    def velocity(z, sigma_BF):
        frames = seen.pop()
        x0 = torch.stack([UNKNOWN[:, 0] if f is None else clip[:, f] for f in frames], 1)
        assert all(
            sigma_BF[0, i] == 1 and torch.equal(z[0, :, i], UNKNOWN[:, 0]) for i, f in enumerate(frames) if f is None
        )
        return (x0 - z) / sigma_BF[:, None, :, None, None].clamp(min=1e-6)

    return seen, velocity


UNKNOWN = torch.randn(12, 1, 2, 2, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    "timeline", [whole(9), segments(9, 4, 4, 1), segments(9, 4, 6, 2, 2, True), ring(9, 10), ring(9, 5)]
)
def test_a_perfect_velocity_arrives_through_windows_too(timeline):
    clip, noise = torch.randn(2, 12, 9, 2, 2, generator=torch.Generator().manual_seed(4))
    seen, velocity = knows_its_window(clip)

    def windows(step):
        seen.extend(reversed(timeline.windows(step)))
        return timeline.windows(step)

    matrix = delayed(levels(4, torch.ones(9)), timeline.starts)
    made = sample(windowed(velocity, map(windows, count()), UNKNOWN), noise[None], matrix)[0]
    torch.testing.assert_close(made, clip, atol=1e-4, rtol=0)
    assert not seen


def test_overlapping_windows_are_averaged_and_frames_in_none_have_velocity_0():
    answers = iter((1.0, 3.0))
    velocity = windowed(lambda z, sigma: torch.full_like(z, next(answers)), iter([[(0, 1), (1, 2)]]), UNKNOWN)
    v = velocity(torch.zeros(1, 12, 4, 2, 2), torch.ones(1, 4))
    assert [v[0, :, f].unique().item() for f in range(4)] == [1, 2, 3, 0]


def test_guidance_extrapolates_and_1_needs_no_null_pass():
    text, null = (TextFeatures(torch.full((1, 3, 4), v), torch.ones(1, 3, dtype=torch.bool)) for v in (2.0, 1.0))
    z, sigma = NOISE[None], torch.ones(1, 5)
    backbone = Recorder()
    assert guided(backbone, text, null, 4.5)(z, sigma).unique().item() == 5.5
    assert guided(backbone, text, null, 1)(z, sigma).unique().item() == 2
    assert backbone.batches == [2, 1]


def test_each_sample_of_a_batch_has_its_own_guidance():
    text, null = (TextFeatures(torch.full((3, 3, 4), v), torch.ones(3, 3, dtype=torch.bool)) for v in (2.0, 1.0))
    v = guided(Recorder(), text, null, torch.tensor([4.5, 3.0, 1.5]))(NOISE.expand(3, *SHAPE), torch.ones(3, 5))
    assert [one.unique().item() for one in v] == [5.5, 4, 2.5]


def test_the_steps_from_any_one_on_give_the_same_bits():
    matrix = levels(5, torch.ones(5))
    states = [NOISE[None], *(z for _, z, _ in denoise(lambda z, sigma: z.sin(), NOISE[None], matrix))]
    for first, z in enumerate(states):
        later = list(denoise(lambda z, sigma: z.sin(), z, matrix, range(first, 5)))
        assert [step for step, _, _ in later] == list(range(first, 5))
        assert all(
            torch.equal(made, expected) for (_, made, _), expected in zip(later, states[first + 1 :], strict=True)
        )


def test_what_fits_in_memory_is_tried_once_and_kept(caplog):
    tried = []

    def predict(z, sigma, text):
        tried.append(len(z))
        if len(z) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return z * text.features.mean((1, 2)).view(-1, 1, 1, 1, 1) + sigma[:, None, :, None, None]

    z, sigma = torch.randn(7, *SHAPE), torch.rand(7, 5)
    text = TextFeatures(torch.randn(7, 3, 4), torch.ones(7, 3, dtype=torch.bool))
    bounded = within_memory(predict)
    expected = z * text.features.mean((1, 2)).view(-1, 1, 1, 1, 1) + sigma[:, None, :, None, None]
    for _ in range(2):
        torch.testing.assert_close(bounded(z, sigma, text), expected)
    assert tried == [7, 4, 2, 2, 2, 1, 2, 2, 2, 1] and len(caplog.records) == 2


def test_an_error_in_the_callback_cancels_sampling():
    def stop(step, x0):
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(perfect, NOISE[None], levels(10, torch.ones(5)), stop)


def test_the_callback_gets_the_estimate_of_the_clean_latents():
    seen = {}
    sample(perfect, NOISE[None], levels(5, torch.ones(5)), seen.__setitem__)
    assert list(seen) == [0, 1, 2, 3, 4]
    for x0 in seen.values():
        torch.testing.assert_close(x0[0], X0, atol=1e-4, rtol=0)


def test_a_job_does_not_depend_on_the_others_in_its_batch():
    """Two jobs with different noise, prompts, levels and conditions, on the tiny network."""
    model = Model(ModelSpec(weights="builtin:tiny-pusa"))
    prompts = ["a red circle moves left on a dark background", "a blue square"]
    noise = torch.randn(2, 12, 5, 8, 8, generator=torch.Generator().manual_seed(2))
    given = Given(torch.randn(12, 1, 8, 8), (0,), (0.2,))
    starts = [start_state(conditions, one) for conditions, one in zip(([], [given]), noise, strict=True)]
    jobs = [(*start, prompt) for start, prompt in zip(starts, prompts, strict=True)]

    def run(*jobs):
        starts, multipliers, prompts = zip(*jobs, strict=True)
        null = model.encode_text([""] * len(jobs))
        velocity = guided(partial(model.backbone.predict, model.transformer), model.encode_text(prompts), null, 1.5)
        return sample(velocity, torch.stack(starts), torch.stack([levels(4, m_F) for m_F in multipliers], 1))

    alone = [run(job)[0] for job in jobs]
    for order in ((0, 1), (1, 0)):
        together = run(*(jobs[i] for i in order))
        for i, z in zip(order, together, strict=True):
            torch.testing.assert_close(z, alone[i], atol=1e-4, rtol=0)
    assert torch.equal(run(jobs[1])[0], alone[1])
