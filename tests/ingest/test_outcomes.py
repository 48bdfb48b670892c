"""Which sources are duplicates or near-duplicates of earlier ones."""

import numpy as np
import pytest

from pusa.ingest.outcomes import MAX_NEAR_DUPLICATE_DIFFERENCE, find_duplicates, find_near_duplicates
from pusa.ingest.verdicts import signature_of
from pusa.manifest.models import Limits
from pusa.video.survey import survey_video


def test_the_original_of_a_duplicate_is_the_first_of_its_kind():
    assert find_duplicates(["a", "b", "a", "c", "b", "a"]) == {2: 0, 4: 1, 5: 0}


def near_duplicates_by_definition(signatures):
    first_original, originals = {}, []
    for index, row in enumerate(signatures.astype(int)):
        differences = [np.abs(signatures[original] - row).mean() for original in originals]
        near = [o for o, d in zip(originals, differences, strict=True) if d <= MAX_NEAR_DUPLICATE_DIFFERENCE]
        if near:
            first_original[index] = near[0]
        else:
            originals.append(index)
    return first_original


@pytest.mark.parametrize("spread", [0, 1, 2, 3, 4, 30])
def test_near_duplicates_are_those_of_comparing_every_pair(spread):
    random = np.random.default_rng(spread)
    centres = random.integers(40, 200, (6, 576))
    noise = random.integers(-spread, spread + 1, (80, 576))
    signatures = (centres[random.integers(0, 6, 80)] + noise).astype(np.uint8)
    signatures[1::7] = 255 - signatures[::7][: len(signatures[1::7])]
    assert find_near_duplicates(signatures) == near_duplicates_by_definition(signatures)


@pytest.mark.parametrize("count", [0, 1])
def test_no_source_and_a_single_source_have_no_near_duplicates(count):
    assert find_near_duplicates(np.zeros((count, 576), np.uint8)) == {}


def test_the_clips_of_the_demo_all_look_different(drawn):
    paths = sorted((drawn / "videos").glob("*.mp4"))
    signatures = [signature_of(survey_video(path, Limits()).thumbnails) for path in paths]
    assert find_near_duplicates(np.frombuffer(b"".join(signatures), np.uint8).reshape(12, -1)) == {}
