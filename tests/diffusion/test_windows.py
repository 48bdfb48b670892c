"""What the network sees when: pieces of a long clip, and a ring."""

from itertools import pairwise, product

import pytest

from pusa.diffusion.windows import ring, segments, whole
from pusa.errors import ConditionError

STEPS = 8
LONG = [
    (frames, window, overlap, stagger, backwards)
    for frames, (window, overlap), stagger, backwards in product(
        (2, 6, 7, 20, 33), ((6, 2), (6, 3), (9, 1)), (None, 4, 9), (False, True)
    )
]


def named(case) -> str:
    frames, window, overlap, stagger, backwards = case
    return f"{frames}-{window}-{overlap}-{stagger}-{'backwards' if backwards else 'forwards'}"


@pytest.mark.parametrize("case", LONG, ids=named)
def test_every_frame_is_seen_while_it_is_made_in_a_window_that_is_a_clip(case):
    frames, window, overlap, stagger, backwards = case
    timeline = segments(frames, STEPS, window, overlap, stagger, backwards)
    assert len(timeline.starts) == frames and min(timeline.starts) == 0
    for step in range(STEPS + timeline.delay):
        making = {f for f, start in enumerate(timeline.starts) if start <= step < start + STEPS}
        (shown,) = timeline.windows(step)
        known = shown[shown[0] is None :]
        assert making and making <= set(known) and len(shown) <= window
        assert all(b == a + 1 for a, b in pairwise(known)) and 0 <= known[0] <= known[-1] < frames
        assert (shown[0] is None) == (known[0] != 0)


@pytest.mark.parametrize("case", LONG, ids=named)
def test_each_piece_goes_on_from_finished_frames(case):
    frames, window, overlap, stagger, backwards = case
    timeline = segments(frames, STEPS, window, overlap, stagger, backwards)
    for step in sorted(set(timeline.starts)):
        before = sum(start + STEPS <= step for start in timeline.starts)
        finished = [f for f in timeline.windows(step)[0] if f is not None and timeline.starts[f] + STEPS <= step]
        assert len(finished) >= min(overlap, before)


def test_segments_take_turns_and_staggered_frames_follow_each_other():
    assert segments(9, STEPS, 6, 2).starts == (0,) * 6 + (8,) * 3
    assert segments(9, STEPS, 6, 2, backwards=True).starts == (16, 8, 8, 8, 0, 0, 0, 0, 0)
    assert segments(4, STEPS, 6, 2, stagger=3).starts == (0, 3, 6, 9)
    assert segments(4, STEPS, 6, 2, stagger=99).starts == (0, 8, 16, 24)


def test_what_fits_is_made_at_once():
    assert segments(6, STEPS, 6, 2).starts == whole(6).starts == (0,) * 6
    assert segments(6, STEPS, 6, 2).windows(3) == [(0, 1, 2, 3, 4, 5)]


def test_impossible_courses_say_what_is_possible():
    with pytest.raises(ConditionError, match="expected a window of 7 or more"):
        segments(9, STEPS, 6, 5)
    with pytest.raises(
        ConditionError, match="4 latent frames at the same time, .* leave room for 3; expected stagger 3 or more"
    ):
        segments(9, STEPS, 6, 2, stagger=2)


@pytest.mark.parametrize("frames, window", [(2, 3), (5, 6), (8, 6), (27, 28), (40, 28), (5, 40)])
def test_a_ring_is_seen_whole_and_cut_elsewhere_each_time(frames, window):
    timeline = ring(frames, window)
    joined = dict.fromkeys(range(frames), 0)
    for step in range(50):
        shown = timeline.windows(step)
        assert {f for one in shown for f in one if f is not None} == set(range(frames))
        for one in shown:
            assert one[0] is None and len(one) <= window and len(set(one)) == len(one)
            assert all(b == (a + 1) % frames for a, b in pairwise(one[1:]))
        for f in {a for one in shown for a in one[1:-1]}:
            joined[f] += 1
    # No two neighbours are apart much more often than others.
    assert min(joined.values()) >= 0.9 * max(joined.values()) - 2
