"""Which latent frames the network sees at each step: segments of a long clip, and a ring."""

from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pusa.diffusion.windows import Timeline, ring, segments, whole
from pusa.errors import ConditionError

STEPS = 8
LONG = [
    (frames, window, overlap, stagger, backwards)
    for frames, (window, overlap), stagger, backwards in product(
        (2, 6, 7, 20, 33), ((6, 2), (6, 3), (9, 1)), (None, 4, 9), (False, True)
    )
]


def case_id(case) -> str:
    frames, window, overlap, stagger, backwards = case
    return f"{frames}-{window}-{overlap}-{stagger}-{'backwards' if backwards else 'forwards'}"


@pytest.mark.parametrize("case", LONG, ids=case_id)
def test_every_frame_is_seen_while_it_is_denoised_in_a_window_that_is_a_clip(case):
    frames, window, overlap, stagger, backwards = case
    timeline = segments(frames, STEPS, window, overlap, stagger, backwards)
    assert len(timeline.starts) == frames and min(timeline.starts) == 0
    for step in range(STEPS + timeline.delay):
        active = {f for f, start in enumerate(timeline.starts) if start <= step < start + STEPS}
        (shown,) = timeline.windows(step)
        known = shown[shown[0] is None :]
        assert active and active <= set(known) and len(shown) <= window
        assert all(b == a + 1 for a, b in pairwise(known)) and 0 <= known[0] <= known[-1] < frames
        assert (shown[0] is None) == (known[0] != 0)


@pytest.mark.parametrize("case", LONG, ids=case_id)
def test_each_segment_continues_from_finished_frames(case):
    frames, window, overlap, stagger, backwards = case
    timeline = segments(frames, STEPS, window, overlap, stagger, backwards)
    for step in sorted(set(timeline.starts)):
        before = sum(start + STEPS <= step for start in timeline.starts)
        finished = [f for f in timeline.windows(step)[0] if f is not None and timeline.starts[f] + STEPS <= step]
        assert len(finished) >= min(overlap, before)


def test_segments_start_one_after_the_other_and_staggered_frames_too():
    assert segments(9, STEPS, 6, 2).starts == (0,) * 6 + (8,) * 3
    assert segments(9, STEPS, 6, 2, backwards=True).starts == (16, 8, 8, 8, 0, 0, 0, 0, 0)
    assert segments(4, STEPS, 6, 2, stagger=3).starts == (0, 3, 6, 9)
    assert segments(4, STEPS, 6, 2, stagger=99).starts == (0, 8, 16, 24)


def test_a_clip_that_fits_the_window_is_denoised_at_once():
    assert segments(6, STEPS, 6, 2).starts == whole(6).starts == (0,) * 6
    assert segments(6, STEPS, 6, 2).windows(3) == [(0, 1, 2, 3, 4, 5)]


def test_impossible_windows_are_refused_with_the_nearest_possible_ones():
    with pytest.raises(ConditionError, match="expected a window of 7 or more"):
        segments(9, STEPS, 6, 5)
    with pytest.raises(
        ConditionError, match=r"4 latent frames at the same time, .* leave room for 3; expected stagger 3 or more"
    ):
        segments(9, STEPS, 6, 2, stagger=2)


@pytest.mark.parametrize("frames, window", [(2, 3), (5, 6), (8, 6), (27, 28), (40, 28), (5, 40)])
def test_a_ring_is_seen_whole_at_each_step_and_cut_at_changing_places(frames, window):
    timeline = ring(frames, window)
    together = dict.fromkeys(range(frames), 0)
    for step in range(50):
        shown = timeline.windows(step)
        assert {f for one in shown for f in one if f is not None} == set(range(frames))
        for one in shown:
            assert one[0] is None and len(one) <= window and len(set(one)) == len(one)
            assert all(b == (a + 1) % frames for a, b in pairwise(one[1:]))
        for f in {a for one in shown for a in one[1:-1]}:
            together[f] += 1
    # No two neighbours are cut apart much more often than others.
    assert min(together.values()) >= 0.9 * max(together.values()) - 2


# Properties, over any clip, window and schedule.


@st.composite
def timelines(draw) -> tuple[Timeline, int, int, int]:
    """Draw segments that are possible, with their frames, steps and window."""
    frames, steps, overlap = draw(st.integers(1, 60)), draw(st.integers(1, 12)), draw(st.integers(0, 6))
    window = draw(st.integers(overlap + 2, 30))
    # Staggered frames that are denoised at the same time must fit the window beside the overlap.
    smallest = -(-steps // (window - 1 - overlap))
    stagger = draw(st.none() | st.integers(smallest, 2 * steps + smallest))
    timeline = segments(frames, steps, window, overlap, stagger, draw(st.booleans()))
    return timeline, frames, steps, window


@given(timelines())
def test_every_frame_is_denoised_by_each_of_its_steps_once_and_is_then_finished(drawn):
    timeline, frames, steps, _ = drawn
    done = [0] * frames
    for step in range(steps + timeline.delay):
        (window,) = timeline.windows(step)
        seen = [frame for frame in window if frame is not None]
        assert len(set(seen)) == len(seen)
        active = [frame for frame in seen if timeline.starts[frame] <= step < timeline.starts[frame] + steps]
        assert active, "a step denoises no frame"
        for frame in active:
            assert done[frame] == step - timeline.starts[frame]
            done[frame] += 1
    assert done == [steps] * frames


@given(timelines())
def test_a_window_is_a_stretch_of_the_clip_no_longer_than_its_limit(drawn):
    timeline, frames, steps, limit = drawn
    for step in range(steps + timeline.delay):
        (window,) = timeline.windows(step)
        known = window[window[0] is None :]
        assert len(window) <= limit and None not in known
        assert known == tuple(range(known[0], known[-1] + 1)) and known[-1] < frames
        assert (window[0] is None) == (known[0] != 0), "only a window from the middle has an unknown first frame"


@given(frames=st.integers(1, 60), window=st.integers(1, 30), overlap=st.integers(0, 30), steps=st.integers(1, 12),
       stagger=st.none() | st.integers(1, 20))  # fmt: skip
def test_segments_are_refused_only_where_no_frame_or_too_few_fit(frames, window, overlap, steps, stagger):
    new = window - 1 - overlap
    fits = new >= 1 and (stagger is None or -(-steps // min(stagger, steps)) <= new)
    try:
        segments(frames, steps, window, overlap, stagger)
    except ConditionError:
        assert not fits
    else:
        assert fits or (frames <= window and stagger is None)


@given(frames=st.integers(1, 60), window=st.integers(2, 40), step=st.integers(0, 200))
def test_a_ring_covers_every_frame_at_every_step(frames, window, step):
    shown = ring(frames, window).windows(step)
    covered = [frame for one in shown for frame in one if frame is not None]
    assert set(covered) == set(range(frames))
    for one in shown:
        assert one[0] is None and None not in one[1:] and len(one) <= window
        assert len(set(one)) == len(one) and all(b == (a + 1) % frames for a, b in pairwise(one[1:]))
    assert len(shown) == -(-frames // min(frames, window - 1)), "no more windows than the ring needs"
