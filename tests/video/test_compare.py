"""Similarity, flicker and colours of drawn frames are what they are by hand."""

import numpy as np
import pytest

from pusa.video.compare import flicker, frame_colours, psnr, ssim
from tests.helpers.drawn_videos import fading, moving


def test_equal_frames_have_similarity_1_and_others_less():
    video = moving(3)
    assert ssim(video, video) == pytest.approx(1, abs=1e-5) and psnr(video, video) == 99
    noise = np.random.default_rng(0).integers(-20, 21, video.shape)
    noisy = np.clip(video + noise, 0, 255).astype(np.uint8)
    assert 0.5 < ssim(video, noisy) < 0.98
    assert ssim(video, noisy) == pytest.approx(np.mean([ssim(video[i : i + 1], noisy[i : i + 1]) for i in range(3)]))
    # With no contrast at all only the means count: (2 ab + c) / (a^2 + b^2 + c), c = (0.01 * 255)^2.
    assert ssim(fading(100), fading(110)) == pytest.approx((22000 + 6.5025) / (22100 + 6.5025), abs=5e-4)  # of fp32


def test_the_ratio_of_a_video_is_that_of_all_its_pixels():
    a, b = np.random.default_rng(0).integers(0, 256, (2, 5, 8, 8, 3), np.uint8)
    error = ((a.astype(float) - b) ** 2).mean()
    assert psnr(a, b) == pytest.approx(10 * np.log10(255**2 / error))
    assert psnr(fading(0, 0), fading(0, 10)) == pytest.approx(10 * np.log10(255**2 / 50))


def test_mean_colours_are_those_of_each_frame():
    video = np.random.default_rng(0).integers(0, 256, (3, 7, 5, 3), np.uint8)
    assert np.allclose(frame_colours(video), video.mean((1, 2))) and frame_colours(video).shape == (3, 3)


@pytest.mark.parametrize(
    ("lumas", "expected"),
    [
        ((10, 20, 30, 40), 0),  # a fade
        ((10, 10, 90, 90), 0),  # a cut
        ((10, 20, 10, 20), 10),
        ((10, 20, 17, 17), 1.5),  # 3 of 10 are taken back, once in two
        ((50, 50, 50), 0),
    ],
)
def test_flicker_is_what_the_next_frame_takes_back(lumas, expected):
    assert flicker(lumas) == pytest.approx(expected)
