import numpy as np
import pytest

from pusa.ingest.outcomes import MAX_NEAR_DUPLICATE_DIFFERENCE, find_duplicates, find_near_duplicates
from pusa.ingest.verdicts import signature_of


def test_each_equal_has_the_first_as_its_original():
    assert find_duplicates(["a", "b", "a", "c", "b", "a"]) == {2: 0, 4: 1, 5: 0}


def one_by_one(pixels):
    """The definition."""
    found, originals = {}, []
    for place, row in enumerate(pixels.astype(int)):
        alike = [other for other in originals if np.abs(pixels[other] - row).mean() <= MAX_NEAR_DUPLICATE_DIFFERENCE]
        if alike:
            found[place] = alike[0]
        else:
            originals.append(place)
    return found


@pytest.mark.parametrize("spread", [0, 1, 2, 3, 4, 30])
def test_neighbours_are_found_as_by_comparing_each_with_each(spread):
    random = np.random.default_rng(spread)
    centres = random.integers(40, 200, (6, 576))
    pixels = (centres[random.integers(0, 6, 80)] + random.integers(-spread, spread + 1, (80, 576))).astype(np.uint8)
    pixels[1::7] = 255 - pixels[::7][: len(pixels[1::7])]
    assert find_near_duplicates(pixels) == one_by_one(pixels)


def test_nothing_looks_like_nothing():
    assert (
        find_near_duplicates(np.empty((0, 576), np.uint8)) == {} == find_near_duplicates(np.zeros((1, 576), np.uint8))
    )


def test_the_demos_clips_all_look_different(drawn):
    from pusa.manifest.models import Limits
    from pusa.video.survey import survey_video

    signatures = [
        signature_of(survey_video(path, Limits()).thumbnails) for path in sorted((drawn / "videos").glob("*.mp4"))
    ]
    pixels = np.frombuffer(b"".join(signatures), np.uint8).reshape(12, -1)
    assert find_near_duplicates(pixels) == {}
