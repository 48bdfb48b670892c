"""Clips of large frames are fitted frame by frame, so that memory does not grow with their size times their length."""

import tracemalloc

import numpy as np
import pytest

from pusa.errors import Rejected
from pusa.video.child import PIECE_BYTES, Child
from pusa.video.decoders import DECODERS, read_clip
from pusa.video.fit import Collected, compute_placement, fit_frames
from pusa.video.media import probe, read_fitted, read_frames
from tests.helpers.media import X264, encoded_video

WIDTH, HEIGHT, FRAMES = 1280, 720, 24
FRAME_BYTES = WIDTH * HEIGHT * 3


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    source = f"testsrc2=size={WIDTH}x{HEIGHT}:rate=24:duration=1"
    return encoded_video(tmp_path_factory.mktemp("large") / "large.mp4", *X264, source=source)


def peak_of(call, *arguments):
    """Return a call's result, and the most bytes that Python and numpy held during it."""
    tracemalloc.start()
    try:
        return call(*arguments), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_clip_for_a_small_job_needs_a_few_frames_of_memory(large):
    probe(large)  # which is kept
    frames, peak = peak_of(read_fitted, large, range(FRAMES), 64, 64)
    assert frames.shape == (FRAMES, 64, 64, 3)
    assert peak < 4 * FRAME_BYTES  # one frame, the next one, and what is made of them; all would be 24
    _, peak = peak_of(read_frames, large, range(FRAMES))
    assert peak < (FRAMES + 4) * FRAME_BYTES  # each is kept once


@pytest.mark.parametrize("kind", ["plain", "anamorphic", "rotated90", "odd"])
def test_fitted_frames_are_those_of_the_whole_frames(kinds, kind):
    facts, indices = probe(kinds[kind]), [5, 5, 0]
    whole = read_frames(kinds[kind], indices)
    sizes = [("crop", 48, 64), ("pad", 48, 64), ("stretch", 48, 64), ("crop", facts.width, facts.height)]
    for how, width, height in sizes:
        expected = fit_frames(whole, width, height, how, "red", facts.pixel_aspect)
        np.testing.assert_array_equal(read_fitted(kinds[kind], indices, width, height, how, "red"), expected)


@pytest.mark.parametrize("decoder", DECODERS)
def test_clips_of_a_table_are_fitted_frame_by_frame(large, decoder):
    place = compute_placement(WIDTH, HEIGHT, 1, 64, 64)
    _, peak = peak_of(read_clip, large, range(FRAMES), decoder, 60, place)
    assert peak < 4 * FRAME_BYTES


def test_an_array_from_a_child_is_held_once():
    size = {"rows": 4, "width": PIECE_BYTES + 1}
    with Child() as child:
        answer, peak = peak_of(child.call, "tests.helpers.decoder_stand_ins:large_array", size, "a.mp4", 60)
    assert (answer.array == np.arange(4, dtype=np.uint8)[:, None]).all() and answer.array.shape == (4, PIECE_BYTES + 1)
    assert peak < answer.array.nbytes + 3 * PIECE_BYTES


def test_frames_of_another_size_than_the_first_are_damage(tmp_path):
    collected = Collected(tmp_path / "a.mp4", 3)
    collected.add(np.zeros((4, 6, 3), np.uint8))
    with pytest.raises(Rejected, match="a frame of 1x1 follows frames of 6x4"):
        collected.add(np.ones((1, 1, 3), np.uint8))
    assert collected.frames.shape == (1, 4, 6, 3)
