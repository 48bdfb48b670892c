"""The tasks as data: their given frames, their presets, and the keys that they refuse."""

from typing import get_args

import pytest

from pusa.backbones.family import Geometry
from pusa.errors import ConditionError
from pusa.registry import find
from pusa.tasks import TASKS
from pusa.tasks.base import Job, per_frame, resolve_positions

GEOMETRY = Geometry(spatial=8, temporal=6, patch=2, channels=12)
EXAMPLES = {
    "text_to_video": {},
    "image_to_video": {"image": "a.png", "position": -1, "multiplier": 0.2},
    "keyframes": {"frames": {0: {"image": "a.png", "multiplier": 0.3}, -1: {"image": "b.png"}}},
    "transition": {"start": "a.mp4", "end": "b.mp4"},
    "extension": {"video": "a.mp4"},
    "completion": {"video": "a.mp4", "given": [1, 3]},
    "loop": {"video": "a.mp4"},
    "long_video": {"image": "a.png", "num_frames": 61, "window": 31},
}
GIVEN = {
    "text_to_video": {},
    "image_to_video": {5: 0.2},
    "keyframes": {0: 0.3, 5: 0.0},
    "transition": {0: 0.3, 3: 0.8, 4: 0.8, 5: 0.8},
    "extension": {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4},
    "completion": {1: 0.0, 3: 0.0},
    "loop": {0: 0.5, 1: 0.2, 2: 0.5},
    "long_video": {0: 0.0},
}


def job(name: str, **keys) -> Job:
    return find(TASKS, name, "task")(**{"id": "x", "task": name, "num_frames": 31, **keys})


def given(made: Job) -> dict[int, float]:
    """Latent frame -> multiplier, of the last pass."""
    last = made.passes(GEOMETRY)[-1]
    found: dict[int, float] = {}
    for condition in last.conditions:
        assert len(condition.take) == len(condition.place) == len(condition.multipliers)
        places = resolve_positions(condition.place, len(last.timeline.starts), "position")
        found |= dict(zip(places, condition.multipliers, strict=True))
    return found


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_its_given_frames_and_multipliers(name):
    made = job(name, **EXAMPLES[name])
    assert isinstance(made, Job) and get_args(type(made).model_fields["task"].annotation) == (name,)
    assert given(made) == pytest.approx(GIVEN[name])


PRESETS = [
    ("image_to_video", {"image": "a.png"}, "mochi", {0: 0.2}),
    ("keyframes", {"frames": {0: {"image": "a"}, 3: {"image": "b"}, -1: {"image": "c", "multiplier": 0.1}}}, "mochi",
     {0: 0.3, 3: 0.7, 5: 0.1}),
    ("keyframes", {"frames": {0: {"image": "a"}, -1: {"image": "b"}}}, "wan", {0: 0.2, 5: 0.5}),
    ("transition", {"start": "a", "end": "b", "end_frames": [-1]}, "exact", {0: 0, 5: 0}),
    ("extension", {"video": "a"}, "wan", {0: 0, 1: 0.3, 2: 0.5, 3: 0.7}),
    ("extension", {"video": "a", "given": [0, 1, 2, 3, 4]}, "mochi", {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4, 4: 0.4}),
    ("extension", {"video": "a", "direction": "backwards"}, "mochi", {2: 0.4, 3: 0.3, 4: 0.2, 5: 0.1}),
]  # fmt: skip


@pytest.mark.parametrize("name, keys, preset, expected", PRESETS)
def test_presets_are_the_published_numbers(name, keys, preset, expected):
    assert given(job(name, preset=preset, **keys)) == pytest.approx(expected)


def test_a_transition_ends_with_the_end_of_its_second_clip():
    start, end = job("transition", **EXAMPLES["transition"]).conditions()
    assert (start.take, start.from_end) == ((0,), False)
    assert (end.take, end.from_end) == ((-3, -2, -1), True)
    (joint,) = job("transition", encoding="joint", **EXAMPLES["transition"]).conditions()
    assert joint.take == joint.place == (0, -3, -2, -1) and joint.joined == end.source


def test_a_transition_can_lead_from_the_end_of_one_clip_to_the_start_of_another():
    start, end = job("transition", start="a", end="b", start_first_frame=-1, end_first_frame=0).conditions()
    assert (start.take, start.place, start.first_frame) == ((0,), (0,), -1)
    assert (end.take, end.place, end.first_frame, end.from_end) == ((1, 2, 3), (-3, -2, -1), 0, False)


@pytest.mark.parametrize(
    "name, keys",
    [
        ("extension", {"given": [3, 4, 5]}),
        ("extension", {"given": [0, 2]}),
        ("extension", {"given": [1, 3], "direction": "backwards"}),
        ("long_video", {"given": [1, 0]}),
    ],
)
def test_tasks_that_continue_a_clip_continue_from_neighbouring_frames(name, keys):
    with pytest.raises(ValueError, match="to keep other frames use completion"):
        job(name, video="a", **keys)


def test_an_extension_backwards_ends_with_the_clip():
    (condition,) = job("extension", video="a", direction="backwards", given=[1, 2, 3]).conditions()
    assert (condition.take, condition.place) == ((1, 2, 3), (-3, -2, -1))


def test_completion_keeps_every_frame_that_is_not_made():
    assert given(job("completion", video="a", made=[0, -1], multipliers="0..0.3")) == pytest.approx(
        {1: 0, 2: 0.1, 3: 0.2, 4: 0.3}
    )
    with pytest.raises(ConditionError, match="leaves none of the 6"):
        given(job("completion", video="a", made=range(6)))
    with pytest.raises(ConditionError, match="made 6 is outside"):
        given(job("completion", video="a", made=[6]))
    for keys in ({}, {"given": [1], "made": [2]}):
        with pytest.raises(ValueError, match="`given`, the latent frames to keep, or `made`"):
            job("completion", video="a", **keys)


def test_a_loop_from_a_prompt_makes_a_clip_and_then_closes_it():
    first, ring = job("loop").passes(GEOMETRY)
    assert len(first.timeline.starts) == 4 and not first.conditions
    (clip,) = ring.conditions
    assert clip.source is None and clip.take == (1, 2, 3) and clip.place == (0, 1, 2) and len(ring.timeline.starts) == 5
    assert len(job("loop", image="a").passes(GEOMETRY)) == len(job("loop", video="a").passes(GEOMETRY)) == 1
    assert given(job("loop", closing=4, multipliers=1.0)) == {0: 1.0}
    with pytest.raises(ConditionError, match=r"closing 5 leaves none of 5 latent frames; expected 1\.\.4"):
        given(job("loop", closing=5))
    with pytest.raises(ConditionError, match="num_frames and window of 13 or more"):
        given(job("loop", num_frames=7))


@pytest.mark.parametrize("name", ["loop", "long_video"])
def test_a_picture_and_a_clip_together_are_refused(name):
    with pytest.raises(ValueError, match=r"not both"):
        job(name, image="a", video="b")


@pytest.mark.parametrize("name", ["long_video", "extension", "loop"])
def test_a_window_that_is_not_a_legal_length_is_refused_with_the_nearest_two(name):
    with pytest.raises(ConditionError, match=r"window 30 is not 6k \+ 1; the nearest are 25 and 31"):
        given(job(name, **{**EXAMPLES[name], "num_frames": 61, "window": 30}))


IDLE = [
    ("loop", {"image": "a", "closing": 3}, "closing would have no effect: with `image`"),
    ("loop", {"first_frame": 9}, "first_frame would have no effect: `video` is not set"),
    ("long_video", {"given": [9]}, "given would have no effect"),
    ("long_video", {"multipliers": 0.3}, "multipliers would have no effect: neither `image` nor `video` is set"),
    (
        "extension",
        {"video": "a", "preset": "wan", "multipliers": 0.1},
        "preset would have no effect: `multipliers` is set",
    ),
    ("transition", {"start": "a", "end": "b", "preset": "exact", "multipliers": 0.1}, "preset would have no effect"),
    ("image_to_video", {"image": "a", "preset": "wan", "multiplier": 0.1}, "preset would have no effect"),
]


@pytest.mark.parametrize("name, keys, message", IDLE)
def test_a_key_without_effect_is_refused(name, keys, message):
    with pytest.raises(ValueError, match=message):
        job(name, **keys)


@pytest.mark.parametrize("name", TASKS)
def test_a_job_is_the_same_after_it_was_written_and_read(name):
    made = job(name, **EXAMPLES[name])
    assert (
        type(made).model_validate(made.model_dump()) == type(made).model_validate_json(made.model_dump_json()) == made
    )


@pytest.mark.parametrize(
    "keys",
    [
        {"name": "extension", "video": "a", "given": [-1]},
        {"name": "long_video", "video": "a", "given": [-1]},
        {"name": "transition", "start": "a", "end": "b", "start_frames": [-1]},
        {"name": "transition", "start": "a", "end": "b", "end_frames": [0]},
    ],
)
def test_frames_that_are_counted_from_an_unknown_end_are_refused(keys):
    with pytest.raises(ValueError, match=r"greater than or equal to 0|less than 0"):
        job(**keys)


def test_the_last_frame_of_a_completion_is_taken_from_and_put_at_the_same_place():
    """Its latent frame -1 is named by the place in the video, which a shorter clip does not reach."""
    ((condition,),) = [p.conditions for p in job("completion", video="a", given=[0, -1]).passes(GEOMETRY)]
    assert condition.take == condition.place == (0, 5)


def test_a_ramp_goes_from_one_end_to_the_other():
    assert per_frame("0.1..0.4", (0, 1, 2, 3), "m") == pytest.approx((0.1, 0.2, 0.3, 0.4))
    assert per_frame("0.3..0.3", (4,), "m") == (0.3,)
    assert per_frame("0.5..0", (0, 1, 2), "m") == (0.5, 0.25, 0)


@pytest.mark.parametrize("ramp", ["0.1..", "a..b", "0.1..1.5", "-1..0", "0..nan", "0.1..0.2..0.3"])
def test_a_malformed_ramp_is_refused(ramp):
    with pytest.raises(ValueError, match=r"a list of them, or a ramp like 0\.1\.\.0\.4"):
        job("completion", video="a", given=[0], multipliers=ramp)


def test_multipliers_of_the_wrong_length_are_refused():
    assert per_frame(0.5, (0, 1, 2), "m") == (0.5, 0.5, 0.5)
    with pytest.raises(ConditionError, match=r"2 multipliers for 3 frames \[0, 1, 2\]"):
        per_frame((0.1, 0.2), (0, 1, 2), "m")


@pytest.mark.parametrize("index", [6, -7, 100])
def test_a_position_outside_names_the_legal_range(index):
    with pytest.raises(ConditionError, match=rf"position {index} .* allowed are -6\.\.5"):
        resolve_positions([index], 6, "position")


def test_two_conditions_on_one_frame_are_refused():
    with pytest.raises(ConditionError, match="twice"):
        resolve_positions([5, -1], 6, "position")
