import numpy as np
import pytest

from pusa.ingest.accounts import ALIKE, alike_to_earlier, same_as_earlier
from pusa.ingest.verdict import _signature


def test_each_equal_has_the_first_as_its_original():
    assert same_as_earlier(["a", "b", "a", "c", "b", "a"]) == {2: 0, 4: 1, 5: 0}


def one_by_one(pixels):
    """The definition."""
    found, originals = {}, []
    for place, row in enumerate(pixels.astype(int)):
        alike = [other for other in originals if np.abs(pixels[other] - row).mean() <= ALIKE]
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
    assert alike_to_earlier(pixels) == one_by_one(pixels)


def test_nothing_looks_like_nothing():
    assert alike_to_earlier(np.empty((0, 576), np.uint8)) == {} == alike_to_earlier(np.zeros((1, 576), np.uint8))


def test_the_demos_clips_all_look_different(drawn):
    from pusa.manifest.models import Limits
    from pusa.video.survey import survey

    signatures = [_signature(survey(path, Limits()).thumbnails) for path in sorted((drawn / "videos").glob("*.mp4"))]
    pixels = np.frombuffer(b"".join(signatures), np.uint8).reshape(12, -1)
    assert alike_to_earlier(pixels) == {}
