from typing import get_args

import pytest

from pusa.errors import ConditionError
from pusa.tables import find
from pusa.tasks import TASKS
from pusa.tasks.base import Job, positions, spread

EXAMPLES = {
    "text_to_video": {},
    "image_to_video": {"image": "a.png", "position": -1, "multiplier": 0.2},
    "keyframes": {"frames": {0: {"image": "a.png", "multiplier": 0.3}, -1: {"image": "b.png"}}},
    "transition": {"start": "a.mp4", "end": "b.mp4"},
    "extension": {"video": "a.mp4"},
    "completion": {"video": "a.mp4", "given": [1, 3]},
}
GIVEN = {
    "text_to_video": {},
    "image_to_video": {5: 0.2},
    "keyframes": {0: 0.3, 5: 0.0},
    "transition": {0: 0.3, 3: 0.8, 4: 0.8, 5: 0.8},
    "extension": {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4},
    "completion": {1: 0.0, 3: 0.0},
}


@pytest.mark.parametrize("name", TASKS)
def test_every_task_gives_what_it_says(name):
    task = find(TASKS, name, "task")
    job = task(id="x", task=name, **EXAMPLES[name])
    assert isinstance(job, Job) and get_args(task.model_fields["task"].annotation) == (name,)
    found: dict[int, float] = {}
    for condition in job.conditions():
        assert len(condition.take) == len(condition.place) == len(condition.multipliers)
        found |= dict(zip(positions(condition.place, 6, "position"), condition.multipliers, strict=True))
    assert found == pytest.approx(GIVEN[name])


def test_a_transition_ends_with_the_end_of_its_second_clip():
    start, end = find(TASKS, "transition", "task")(id="x", **EXAMPLES["transition"]).conditions()
    assert (start.take, start.from_end) == ((0,), False)
    assert (end.take, end.from_end) == ((-3, -2, -1), True)


def test_multipliers_of_the_wrong_length_are_refused():
    assert spread(0.5, (0, 1, 2), "m") == (0.5, 0.5, 0.5)
    with pytest.raises(ConditionError, match=r"2 multipliers for 3 frames \[0, 1, 2\]"):
        spread((0.1, 0.2), (0, 1, 2), "m")


@pytest.mark.parametrize("index", [6, -7, 100])
def test_a_position_outside_names_the_legal_range(index):
    with pytest.raises(ConditionError, match=rf"position {index} .* allowed are -6\.\.5"):
        positions([index], 6, "position")


def test_two_conditions_on_one_frame_are_refused():
    with pytest.raises(ConditionError, match="twice"):
        positions([5, -1], 6, "position")
