"""Clips keep to scenes and gaps, have the frames of their shape, and are retimed by time stamps."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from pusa.errors import Rejected
from pusa.ingest.cutting import (
    Timing,
    choose_shape,
    count_retimed,
    cut_source,
    nearest_in_time,
    snap_to_even_grid,
)
from pusa.manifest.models import Bucket, ClipSettings
from pusa.video.media import nearest_frames

NTSC = Fraction(1000, 1001)
RATES = [(30, 15), (30, 24), (25, 24), (24, 24), (12, 24), (60, 24), (24, 30), (50, 20), (30, 20), (15, 10), (120, 24)]
RATES += [(30 * NTSC, 24), (30 * NTSC, 30), (24 * NTSC, 24), (60 * NTSC, 24)]


def even_timing(count, fps):
    return Timing(np.arange(count) / float(fps), float(fps))


def cut_frames(timing, **clip_settings):
    cuts = cut_source(timing, 64, 64, ClipSettings(width=64, height=64, **clip_settings))
    return [cut.frames.tolist() for cut in cuts]


def shape(width, height, num_frames=7):
    return Bucket(width=width, height=height, num_frames=num_frames)


# Properties of all timings and clip settings. Nothing is measured by the clock, which a busy machine would upset.

PROPERTY = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
)


@st.composite
def increasing_times(draw, min_size=1):
    """Times of an even source, possibly rounded to milliseconds, or with any intervals."""
    if draw(st.booleans()):
        count, fps = draw(st.integers(min_size, 60)), draw(st.sampled_from([8, 12, 23.976, 24, 25, 30, 60]))
        times = np.arange(count) / fps
        times = times.round(3) if draw(st.booleans()) else times
    else:
        intervals = st.one_of(st.floats(0.002, 0.1), st.floats(0.2, 0.7))
        times = np.cumsum(draw(st.lists(intervals, min_size=min_size, max_size=60)))
    return times + draw(st.sampled_from([0.0, 7.25]))


@st.composite
def timings(draw):
    times = draw(increasing_times())
    fps = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 24.0
    starts = draw(st.sets(st.integers(1, len(times) - 1), max_size=4)) if len(times) > 1 else set()
    return Timing(times, fps, tuple(sorted(starts)))


SIDES = st.integers(1, 20).map(lambda n: 8 * n)
SHAPES = st.builds(shape, SIDES, SIDES, st.integers(1, 20))
CLIP_SETTINGS = st.builds(
    ClipSettings,
    buckets=st.lists(SHAPES, min_size=1, max_size=3).map(tuple),
    fps=st.one_of(st.none(), st.sampled_from([8, 12, 23.976, 24, 30, 60])),
    windows=st.just("all"),
    longest_frame=st.sampled_from([0.05, 0.25, 0.5, 2.0]),
)


def cut_or_discard(timing, clip_settings):
    """Return the clips of a 160x96 source; Hypothesis discards sources that are too short."""
    try:
        return cut_source(timing, 160, 96, clip_settings)
    except Rejected as reject:
        assert reject.reason == "too_short"
        assume(False)


@PROPERTY
@given(timings(), CLIP_SETTINGS)
def test_a_clip_has_the_frames_of_its_shape_in_order(timing, clip_settings):
    for cut in cut_or_discard(timing, clip_settings):
        assert cut.shape in clip_settings.shapes and len(cut.frames) == cut.shape.num_frames
        assert cut.frames.dtype == np.int32 and cut.fps == (clip_settings.fps or timing.fps)
        assert cut.frames[0] >= 0 and cut.frames[-1] < len(timing.times)
        steps = np.diff(cut.frames)
        assert (steps >= 0).all() if clip_settings.fps else (steps == 1).all()


@PROPERTY
@given(timings(), CLIP_SETTINGS)
def test_no_clip_crosses_a_scene_start_or_a_gap(timing, clip_settings):
    margin = 0.005  # snapping to an even grid may move two time stamps by a millisecond each
    gaps = np.flatnonzero(np.diff(timing.times) > clip_settings.longest_frame + margin) + 1
    for cut in cut_or_discard(timing, clip_settings):
        for bound in (*timing.scene_starts, *gaps):
            assert not cut.frames[0] < bound <= cut.frames[-1]


@PROPERTY
@given(timings(), CLIP_SETTINGS)
def test_clips_follow_one_another_and_first_is_the_first_of_all(timing, clip_settings):
    cuts = cut_or_discard(timing, clip_settings)
    for before, after in itertools.pairwise(cuts):
        # At a higher rate, a frame is repeated, and may end one clip and begin the next.
        assert before.frames[-1] <= after.frames[0] if clip_settings.fps else before.frames[-1] < after.frames[0]
    (first,) = cut_source(timing, 160, 96, clip_settings.model_copy(update={"windows": "first"}))
    assert (first.frames.tolist(), first.shape) == (cuts[0].frames.tolist(), cuts[0].shape)
    assert (first.fps, first.retimed) == (cuts[0].fps, cuts[0].retimed)


def count_retimed_slowly(times, fps):
    allowed = max(0.1 / fps, 0.001) + 1e-6
    return sum(abs(time - times[0] - k / fps) > allowed for k, time in enumerate(times))


@PROPERTY
@given(timings(), CLIP_SETTINGS)
def test_retimed_frames_are_counted_as_by_a_slow_loop(timing, clip_settings):
    times = snap_to_even_grid(timing.times, timing.fps)
    for cut in cut_or_discard(timing, clip_settings):
        assert cut.retimed == count_retimed_slowly(times[cut.frames].tolist(), cut.fps)


@PROPERTY
@given(timings(), CLIP_SETTINGS)
def test_a_source_is_too_short_only_if_each_shot_is(timing, clip_settings):
    times = snap_to_even_grid(timing.times, timing.fps)
    shots, shortest = [[0]], min(shape.num_frames for shape in clip_settings.shapes)
    for index in range(1, len(times)):
        is_gap = times[index] - times[index - 1] > clip_settings.longest_frame + 0.001
        shots.append([index]) if is_gap or index in timing.scene_starts else shots[-1].append(index)
    lengths = [
        math.floor((times[shot[-1]] - times[shot[0]] + 1e-6) * clip_settings.fps) + 1
        if clip_settings.fps
        else len(shot)
        for shot in shots
    ]
    if max(lengths) < shortest:
        with pytest.raises(Rejected, match=f"give {max(lengths)} at .*; the shortest shape has {shortest}"):
            cut_source(timing, 160, 96, clip_settings)
    else:
        assert cut_source(timing, 160, 96, clip_settings)


@PROPERTY
@given(increasing_times(min_size=2), st.floats(1, 60))
def test_shown_frames_are_nearest_in_time(times, fps):
    shown = nearest_in_time(times, fps)
    due = times[0] + np.arange(len(shown)) / fps
    distances = np.abs(times[None] - due[:, None])
    assert (distances[range(len(shown)), shown] <= distances.min(1) + 1e-5).all()
    assert due[-1] <= times[-1] + 1e-5 < due[-1] + 1 / fps + 2e-5, "up to the last frame's time"


@PROPERTY
@given(timings())
def test_snapping_to_an_even_grid_moves_no_frame_by_more_than_a_millisecond(timing):
    snapped = snap_to_even_grid(timing.times, timing.fps)
    assert snapped[0] == 0 and (np.diff(snapped) > 0).all()
    assert np.abs(snapped - (timing.times - timing.times[0])).max() <= 0.001 + 2e-6


@PROPERTY
@given(st.lists(SHAPES, min_size=1, max_size=6), st.integers(1, 20), st.integers(50, 2000), st.integers(50, 2000))
def test_the_chosen_shape_keeps_as_much_of_a_source_as_any(shapes, num_frames, width, height):
    fitting = [s for s in shapes if s.num_frames <= num_frames]
    chosen = choose_shape(shapes, num_frames, width, height)
    if not fitting:
        assert chosen is None
        return
    ratios = [width / height * s.height / s.width for s in fitting]
    kept = {s: min(r, 1 / r) for s, r in zip(fitting, ratios, strict=True)}
    assert kept[chosen] >= max(kept.values()) * math.exp(-0.0101)


# Examples.


@pytest.mark.parametrize("fps, clip_fps", RATES)
@pytest.mark.parametrize("is_rounded", [False, True])
def test_an_even_source_is_retimed_by_its_rate(fps, clip_fps, is_rounded):
    """This holds too if the container has rounded times to milliseconds, so that the rate is known approximately."""
    timing = even_timing(200, fps)
    if is_rounded:
        times = timing.times.round(3) + 7
        timing = Timing(times, (len(times) - 1) / (times[-1] - times[0]))
    expected = nearest_frames(200, Fraction(fps) / clip_fps)
    assert cut_frames(timing, num_frames=len(expected), fps=clip_fps) == [expected]
    with pytest.raises(Rejected, match=r"200 frames at .* fps give"):
        cut_frames(timing, num_frames=len(expected) + 1, fps=clip_fps)


def test_of_two_equally_near_frames_the_earlier_is_shown():
    assert nearest_in_time(np.array([0, 1, 2]), 2).tolist() == [0, 0, 1, 1, 2]


def test_an_uneven_source_is_retimed_by_its_time_stamps():
    times = np.concatenate([np.arange(10) / 10, 1 + np.arange(20) / 20])
    timing = Timing(times, 29 / times[-1])
    assert cut_frames(timing, num_frames=20, fps=10) == [[*range(10), *range(10, 30, 2)]]
    assert cut_frames(timing, num_frames=9, fps=5) == [[0, 2, 4, 6, 8, 10, 14, 18, 22]]


def test_frames_shown_away_from_their_time_count_as_retimed():
    def retimed(timing, fps, num_frames=7):
        return [cut.retimed for cut in cut_source(timing, 64, 64, ClipSettings(num_frames=num_frames, fps=fps))]

    assert retimed(even_timing(31, 24), 24) == [0]
    assert retimed(even_timing(31, 30), 15) == [0]
    assert retimed(even_timing(31, 17), None) == [0]
    assert retimed(even_timing(31, 12), 24) == [3]
    variable = np.array([0, 1, 2, 3.5, 4, 5, 6]) / 8
    assert retimed(Timing(variable, 8), None) == [1], "the source's rate is kept, and it varies"
    assert count_retimed(np.array([5, 6.05, 7.2, 8]), 1) == 1


def test_windows_lie_one_after_another():
    timing, windows = even_timing(22, 30), [list(range(start, start + 7)) for start in (0, 7, 14)]
    assert cut_frames(timing, num_frames=7, fps=None, windows="all") == windows
    assert cut_frames(timing, num_frames=7, fps=None) == [list(range(7))]
    assert cut_frames(even_timing(4, 12), num_frames=7, fps=24) == [[0, 0, 1, 1, 2, 2, 3]]


@pytest.mark.parametrize("fps", [None, 24])
def test_a_frame_that_is_shown_for_too_long_ends_a_clip(fps):
    times = np.concatenate([np.arange(20), np.arange(20) + 20 + 24]) / 24  # a second is missing in the middle
    timing = Timing(times, 16)
    assert cut_frames(timing, num_frames=19, fps=fps, windows="all") == [list(range(19)), list(range(20, 39))]
    with pytest.raises(Rejected, match=r"5 frames at 1 fps give 1 at .* in the longest of 5 shots"):
        cut_frames(even_timing(5, 1), num_frames=7, fps=fps)
    assert len(cut_frames(even_timing(5, 1), num_frames=7, fps=24, longest_frame=2, windows="all")) == 13


@pytest.mark.parametrize("fps", [None, 24, 12, 48])
def test_every_long_enough_scene_gives_clips(fps):
    timing = Timing(np.arange(40) / 24, 24, (5, 19, 20))
    bounds = [0, 5, 19, 20, 40]
    clips = cut_frames(timing, num_frames=4, fps=fps, windows="all")
    scenes = [np.searchsorted(bounds, clip, "right") for clip in clips]
    assert clips and all(len(set(scene)) == 1 for scene in scenes)
    assert {4} < {scene[0] for scene in scenes}, "more than one scene gives clips"


def test_the_first_clip_is_of_the_first_scene_that_is_long_enough():
    timing = Timing(np.arange(40) / 24, 24, (5, 19, 20))
    assert cut_frames(timing, num_frames=7, fps=24) == [list(range(5, 12))]
    message = (
        r"40 frames at 24 fps give 20 at 24 fps in the longest of 4 shots \(longest_frame: 0\.25\); "
        "the shortest shape has 31"
    )
    with pytest.raises(Rejected, match=message):
        cut_frames(timing, num_frames=31, fps=24)


@pytest.mark.parametrize(
    "shapes, source, chosen",
    [
        ([shape(64, 64), shape(128, 64)], (1920, 1080), 1),
        ([shape(64, 64), shape(128, 64)], (1000, 900), 0),
        ([shape(848, 480), shape(424, 240)], (640, 360), 1),  # the other would be enlarged
        ([shape(424, 240), shape(848, 480)], (1920, 1080), 1),
        ([shape(64, 64, 13), shape(64, 64, 31)], (64, 64), 1),
        ([shape(64, 64, 31), shape(128, 64, 37)], (128, 64), 0),  # the other is too long
    ],
)
def test_the_shape_that_distorts_least_is_chosen(shapes, source, chosen):
    for order in (shapes, shapes[::-1]):
        assert choose_shape(order, 31, *source) == shapes[chosen]


def test_each_scene_has_the_shape_that_it_is_long_enough_for():
    buckets = (shape(64, 64, 13), shape(64, 64, 31))
    cuts = cut_source(Timing(np.arange(60) / 24, 24, (20,)), 64, 64, ClipSettings(buckets=buckets, windows="all"))
    assert [(int(cut.frames[0]), cut.shape.num_frames) for cut in cuts] == [(0, 13), (20, 31)]
    with pytest.raises(Rejected, match="the shortest shape has 13"):
        cut_source(even_timing(9, 24), 64, 64, ClipSettings(buckets=buckets))
