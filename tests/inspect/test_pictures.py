"""Pictures of cuts and strips of frames."""

import numpy as np
import pytest

from pusa.inspect.pictures import OUTLINE, display_boxes, draw_cut, film_strip
from pusa.video.fit import compute_placement


def clip(width, height, fit, aspect=1.0, source=(200, 100)):
    place = compute_placement(*source, aspect, width, height, fit)
    return {"width": width, "height": height, "fit": fit, "box": list(place.box), "pixel_aspect": aspect}


WHITE = np.full((100, 200, 3), 255, np.uint8)


def test_the_part_that_a_crop_removes_is_dark_and_the_rest_is_outlined():
    picture = np.asarray(draw_cut(WHITE, clip(64, 64, "crop")))
    assert picture.shape == (160, 320, 3)
    assert (picture[80, [10, 70, 250, 310]] < 100).all()  # left and right of the square in the middle
    assert (picture[80, [90, 160, 230]] == 255).all()
    assert (picture[80, 80] == OUTLINE).all() and (picture[0, 160] == OUTLINE).all()


def test_padding_shows_bars_inside_the_outline():
    picture = np.asarray(draw_cut(WHITE, clip(64, 64, "pad")))
    assert picture.shape == (240, 240, 3)
    assert (picture[[20, 220], 120] == 0).all() and (picture[120, [20, 120, 220]] == 255).all()
    assert (picture[0, 120] == OUTLINE).all() and (picture[120, 239] == OUTLINE).all()


def test_stretching_keeps_the_whole_frame_in_the_shape_of_the_source():
    picture = np.asarray(draw_cut(WHITE, clip(64, 64, "stretch")))
    assert picture.shape == (160, 320, 3) and (picture[4:-4, 4:-4] == 255).all()


@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize("aspect", [0.5, 1.0, 32 / 27])
@pytest.mark.parametrize("size", [(64, 64), (96, 64), (64, 96)])
def test_the_kept_part_has_the_clips_shape_on_the_screen(fit, aspect, size):
    whole, kept = display_boxes(clip(*size, fit, aspect), 200, 100)
    assert whole == (0, 0, 200 * aspect, 100)
    assert (kept[2] - kept[0]) / (kept[3] - kept[1]) == pytest.approx(size[0] / size[1])
    inside = whole if fit == "pad" else kept
    outside = kept if fit == "pad" else whole
    assert all(a <= b + 1e-9 for a, b in zip(outside[:2], inside[:2], strict=True))
    assert all(a >= b - 1e-9 for a, b in zip(outside[2:], inside[2:], strict=True))


def test_an_extreme_shape_still_gives_a_picture():
    assert min(draw_cut(np.zeros((4, 4000, 3), np.uint8), clip(64, 64, "crop", source=(4000, 4))).size) >= 1


def test_a_film_strip_runs_from_the_first_to_the_last_frame():
    video = np.zeros((31, 64, 32, 3), np.uint8)
    video[0], video[-1] = 50, 200
    strip = np.asarray(film_strip(video))
    assert strip.shape == (128, 8 * 64, 3) and (strip[:, :64] == 50).all() and (strip[:, -64:] == 200).all()
