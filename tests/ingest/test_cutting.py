import math
from fractions import Fraction

import numpy as np
import pytest

from pusa.errors import Rejected
from pusa.ingest.cutting import Timing, choose_shape, count_retimed, cut_source, nearest_in_time
from pusa.manifest.models import Bucket, ClipSettings
from pusa.video.media import nearest_frames

NTSC = Fraction(1000, 1001)
RATES = [(30, 15), (30, 24), (25, 24), (24, 24), (12, 24), (60, 24), (24, 30), (50, 20), (30, 20), (15, 10), (120, 24)]
RATES += [(30 * NTSC, 24), (30 * NTSC, 30), (24 * NTSC, 24), (60 * NTSC, 24)]


def even(count, fps):
    return Timing(np.arange(count) / float(fps), float(fps))


def frames(timing, **rule):
    return [clip.frames.tolist() for clip in cut_source(timing, 64, 64, ClipSettings(width=64, height=64, **rule))]


@pytest.mark.parametrize("fps, wanted", RATES)
@pytest.mark.parametrize("rounded", [False, True])
def test_an_even_source_is_retimed_as_by_its_rate(fps, wanted, rounded):
    """Also where the container has rounded its times to milliseconds, in which case its rate is known but roughly."""
    timing = even(200, fps)
    if rounded:
        times = timing.times.round(3) + 7
        timing = Timing(times, (len(times) - 1) / (times[-1] - times[0]))
    expected = nearest_frames(200, Fraction(fps) / wanted)
    assert frames(timing, num_frames=len(expected), fps=wanted) == [expected]
    with pytest.raises(Rejected, match=r"200 frames at .* make"):
        frames(timing, num_frames=len(expected) + 1, fps=wanted)


def test_of_two_equally_near_frames_the_earlier_is_shown():
    assert nearest_in_time(np.array([0, 1, 2]), 2).tolist() == [0, 0, 1, 1, 2]


def test_an_uneven_source_is_retimed_by_its_time_stamps():
    times = np.concatenate([np.arange(10) / 10, 1 + np.arange(20) / 20])
    timing = Timing(times, 29 / times[-1])
    assert frames(timing, num_frames=20, fps=10) == [[*range(10), *range(10, 30, 2)]]
    assert frames(timing, num_frames=9, fps=5) == [[0, 2, 4, 6, 8, 10, 14, 18, 22]]


def test_frames_are_nearest_in_time_whatever_the_times():
    random = np.random.default_rng(0)
    times = np.cumsum(random.uniform(0.01, 0.1, 200))
    shown = nearest_in_time(times, 24)
    due = times[0] + np.arange(len(shown)) / 24
    away = np.abs(times[None] - due[:, None])
    assert np.allclose(away[range(len(shown)), shown], away.min(1)) and due[-1] <= times[-1] < due[-1] + 1 / 24


def test_retimed_frames_are_those_shown_away_from_their_time():
    def retimed(timing, fps, num_frames=7):
        return [clip.retimed for clip in cut_source(timing, 64, 64, ClipSettings(num_frames=num_frames, fps=fps))]

    assert retimed(even(31, 24), 24) == retimed(even(31, 30), 15) == retimed(even(31, 17), None) == [0]
    assert retimed(even(31, 12), 24) == [3]
    varying = np.array([0, 1, 2, 3.5, 4, 5, 6]) / 8
    assert retimed(Timing(varying, 8), None) == [1], "the rate is kept, and it varies"
    assert count_retimed(np.array([5, 6.05, 7.2, 8]), 1) == 1


def test_windows_lie_one_after_another():
    assert frames(even(22, 30), num_frames=7, fps=None, windows="all") == [list(range(s, s + 7)) for s in (0, 7, 14)]
    assert frames(even(22, 30), num_frames=7, fps=None) == [list(range(7))]
    assert frames(even(4, 12), num_frames=7, fps=24) == [[0, 0, 1, 1, 2, 2, 3]]


@pytest.mark.parametrize("fps", [None, 24])
def test_what_stands_still_for_too_long_is_no_clip(fps):
    hole = np.concatenate([np.arange(20), np.arange(20) + 20 + 24]) / 24  # a second is missing in the middle
    assert frames(Timing(hole, 16), num_frames=19, fps=fps, windows="all") == [list(range(19)), list(range(20, 39))]
    with pytest.raises(Rejected, match=r"5 frames at 1 a second make 1 at .* in the longest of 5 stretches"):
        frames(even(5, 1), num_frames=7, fps=fps)
    assert len(frames(even(5, 1), num_frames=7, fps=24, longest_frame=2, windows="all")) == 13


@pytest.mark.parametrize("fps", [None, 24, 12, 48])
def test_no_clip_goes_across_a_scene_start(fps):
    timing = Timing(np.arange(40) / 24, 24, (5, 19, 20))
    bounds = [0, 5, 19, 20, 40]
    clips = frames(timing, num_frames=4, fps=fps, windows="all")
    scenes = [np.searchsorted(bounds, clip, "right") for clip in clips]
    assert clips and all(len(set(scene)) == 1 for scene in scenes)
    assert {4} < {scene[0] for scene in scenes}, "more than one scene gives clips"


def test_the_first_clip_is_of_the_first_scene_that_is_long_enough():
    timing = Timing(np.arange(40) / 24, 24, (5, 19, 20))
    assert frames(timing, num_frames=7, fps=24) == [list(range(5, 12))]
    with pytest.raises(
        Rejected,
        match=r"make 20 at 24 in the longest of 4 stretches \(longest_frame: 0\.25\); the shortest shape has 31",
    ):
        frames(timing, num_frames=31, fps=24)


def shape(width, height, num_frames=7):
    return Bucket(width=width, height=height, num_frames=num_frames)


@pytest.mark.parametrize(
    "shapes, source, chosen",
    [
        ([shape(64, 64), shape(128, 64)], (1920, 1080), 1),
        ([shape(64, 64), shape(128, 64)], (1000, 900), 0),
        ([shape(848, 480), shape(424, 240)], (640, 360), 1),  # the other would be enlarged
        ([shape(424, 240), shape(848, 480)], (1920, 1080), 1),
        ([shape(64, 64, 13), shape(64, 64, 31)], (64, 64), 1),
        ([shape(64, 64, 31), shape(128, 64, 37)], (128, 64), 0),  # too long
    ],
)
def test_the_shape_that_distorts_least_is_chosen(shapes, source, chosen):
    for order in (shapes, shapes[::-1]):
        assert choose_shape(order, 31, *source) == shapes[chosen]


def test_no_other_shape_keeps_more_of_a_source():
    random = np.random.default_rng(1)
    shapes = [shape(8 * int(w), 8 * int(h)) for w, h in random.integers(4, 40, (12, 2))]
    for width, height in random.integers(50, 2000, (50, 2)):
        ratios = [width / height * s.height / s.width for s in shapes]
        kept = {s: min(r, 1 / r) for s, r in zip(shapes, ratios, strict=True)}
        assert kept[choose_shape(shapes, 7, width, height)] >= max(kept.values()) * math.exp(-0.0101)


def test_each_scene_has_the_shape_that_it_is_long_enough_for():
    buckets = (shape(64, 64, 13), shape(64, 64, 31))
    clips = cut_source(Timing(np.arange(60) / 24, 24, (20,)), 64, 64, ClipSettings(buckets=buckets, windows="all"))
    assert [(int(clip.frames[0]), clip.shape.num_frames) for clip in clips] == [(0, 13), (20, 31)]
    with pytest.raises(Rejected, match="the shortest shape has 13"):
        cut_source(even(9, 24), 64, 64, ClipSettings(buckets=buckets))
