"""Noise from seeds: all seeds differ, the noise of small ones never changes, and the rest does not depend on torch."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pusa.diffusion.seeds import WORDS, derived, seeded

LARGEST = 2**63 - 1  # that a manifest allows
SEEDS = st.integers(0, 2**32 - 1) | st.integers(2**32, LARGEST)


def noise(seed: int) -> torch.Tensor:
    return torch.randn(12, 4, 8, 8, generator=seeded(seed))


@pytest.mark.parametrize("seed", [0, 7, 2**31, 2**32 - 1])
def test_a_seed_of_32_bits_gives_what_torch_gives(seed):
    assert torch.equal(noise(seed), torch.randn(12, 4, 8, 8, generator=torch.Generator().manual_seed(seed)))


def test_seeds_that_share_their_lower_bits_or_their_upper_ones_give_different_noise():
    seeds = [low + 2**bit for low in (0, 7, 2**32 - 1) for bit in (32, 33, 40, 52, 53, 62)]
    seeds += [0, 7, 2**32 - 1, LARGEST, 2**62 + 1, 2**62 + 2]
    made = {noise(seed).numpy().tobytes() for seed in seeds}
    assert len(made) == len(set(seeds))


@given(SEEDS, SEEDS)
def test_any_two_seeds_have_different_states_and_one_always_has_the_same(first, second):
    words = [seeded(seed).get_state()[WORDS] for seed in (first, second, first)]
    assert torch.equal(words[0], words[2])
    assert torch.equal(words[0], words[1]) == (first == second)


@given(st.integers(2**32, LARGEST))
def test_a_larger_seed_gives_the_stream_of_numpys_mersenne_twister(seed):
    drawn = torch.empty(700, dtype=torch.int32).random_(generator=seeded(seed))
    stream = np.random.MT19937(seed).random_raw(701)[1:]  # NumPy starts at the last word of the state
    assert (drawn.numpy() == stream % 2**31).all()


def test_a_larger_seed_gives_noise_that_is_normal_and_the_same_on_every_machine():
    values = torch.randn(100_000, generator=seeded(2**40 + 1))
    assert abs(values.mean()) < 0.02 and abs(values.std() - 1) < 0.02 and abs((values**3).mean()) < 0.05
    torch.testing.assert_close(values[:3], torch.tensor([0.469387, -0.395584, 1.541566]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(ValueError, match=f"the seed is {seed}; expected a number from 0"):
        seeded(seed)


def test_the_draws_of_a_run_differ_by_seed_step_and_place():
    draws = [derived("sample", seed, step, place) for seed in (0, 1, 2**31 - 1) for step in (0, 1) for place in (0, 1)]
    assert len({torch.randn(16, generator=draw).numpy().tobytes() for draw in draws}) == len(draws)
