import json
from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image, ImageColor, ImageOps

from pusa.video.fit import LANCZOS, Placement, compute_placement, fit_frames

PILLOW = {
    "crop": lambda image, size, background: ImageOps.fit(image, size, LANCZOS),
    "pad": lambda image, size, background: ImageOps.pad(image, size, LANCZOS, ImageColor.getrgb(background)),
    "stretch": lambda image, size, background: image.resize(size, LANCZOS),
}
SIZES = [(64, 48), (48, 64), (97, 33), (16, 16), (100, 10), (160, 96), (13, 161)]


@pytest.mark.parametrize("how", PILLOW)
def test_square_pixels_are_fitted_bit_for_bit_as_pillow_does(how):
    noise = np.random.default_rng(0)
    for source in SIZES:
        frame = noise.integers(0, 256, (*source[::-1], 3), np.uint8)
        for size in SIZES:
            expected = np.asarray(PILLOW[how](Image.fromarray(frame), size, "red"))
            np.testing.assert_array_equal(fit_frames(frame[None], *size, how, "red")[0], expected)


def test_frames_of_the_size_are_returned_unchanged():
    frames = np.random.default_rng(0).integers(0, 256, (2, 48, 64, 3), np.uint8)
    assert fit_frames(frames, 64, 48) is frames


@pytest.mark.parametrize("pixel_aspect", [0.5, 4 / 3, 2])
def test_a_disc_stays_round_and_centred(pixel_aspect):
    width = round(320 / pixel_aspect)
    y, x = np.mgrid[:240, :width] + 0.5
    disc = np.hypot((x - width / 2) * pixel_aspect, y - 120) < 80
    frame = np.repeat((disc * 255).astype(np.uint8)[..., None], 3, -1)
    for how in ("crop", "pad"):
        (shown,) = fit_frames(frame[None], 120, 120, how, "black", pixel_aspect) > 127
        rows, columns = np.flatnonzero(shown[..., 0].any(1)), np.flatnonzero(shown[..., 0].any(0))
        assert len(rows) == pytest.approx(len(columns), abs=1)
        assert rows.mean() == pytest.approx(59.5, abs=1) and columns.mean() == pytest.approx(59.5, abs=1)
    assert compute_placement(width, 240, pixel_aspect, 160, 120).box == pytest.approx((0, 0, width, 240), abs=1)


def test_a_placement_survives_json():
    place = compute_placement(720, 576, 16 / 15, 848, 480, "crop")
    stored = json.loads(json.dumps(asdict(place)))
    assert Placement(**{**stored, "box": tuple(stored["box"])}) == place
    left, top, right, bottom = place.box
    assert (left, right) == (0, 720) and top == pytest.approx(576 - bottom)
    assert (right - left) * 16 / 15 / (bottom - top) == pytest.approx(848 / 480)
