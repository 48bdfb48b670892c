"""How long jobs should take, estimated from those that were timed."""

import math

import pytest

from pusa.generate.timings import RECENT, Timings, seconds_of
from tests.helpers.stub_model import manifest_of

SETTINGS = {"width": 64, "height": 64, "num_frames": 31, "steps": 30, "guidance": 4.5}


def record(sample=3.0, decode=1.0, **settings):
    return {"job": {**SETTINGS, **settings}, "seconds": {"sample": sample, "decode": decode}}


@pytest.mark.parametrize(
    "settings, seconds",
    [
        ({}, 4),
        ({"guidance": 1}, 2),
        ({"width": 128}, 8),
        ({"steps": 15}, 2),
        ({"num_frames": 62, "guidance": 1}, 4),
        ({"width": 600, "height": 600}, 50 * 600 * 600 / (512 * 512)),  # scaled from the nearest, not from the first
    ],
)
def test_a_job_takes_what_its_shape_took_or_the_nearest_one(settings, seconds):
    timings = Timings.of_records([record(), record(40, 10, width=512, height=512)])
    assert timings.seconds({**SETTINGS, **settings}) == pytest.approx(seconds)


def test_a_job_of_a_manifest_is_estimated_as_its_settings_are():
    (job,) = manifest_of({"id": "a"}).jobs
    timings = Timings()
    assert timings.seconds(job) is None
    timings.add(job, 1.5)
    assert timings.seconds(job) == timings.seconds(job.model_dump()) == 1.5
    assert timings.seconds(job.model_copy(update={"guidance": 2.0})) == 3


def test_one_slow_job_does_not_spoil_the_estimate_and_old_times_are_forgotten():
    timings = Timings.of_records([record(), record(5), record(900)])
    assert timings.seconds(SETTINGS) == 6
    for _ in range(RECENT):
        timings.add(SETTINGS, 7)
    assert timings.seconds(SETTINGS) == 7


@pytest.mark.parametrize(
    "bad",
    [
        {}, {"job": SETTINGS}, {"job": SETTINGS, "seconds": 4}, {"job": SETTINGS, "seconds": {"sample": 3}},
        {**record(), "job": None}, {**record(), "job": []}, record("3"), record(-1), record(True), record(math.nan),
        record(math.inf), record(10**400), record(width=0), record(width="64"), record(steps=None),
        record(width=10**400), record(num_frames=31.5), record(height=True),
    ],
)  # fmt: skip
def test_records_that_somebody_edited_are_ignored(bad):
    assert Timings.of_records([bad]).seconds(SETTINGS) is None
    assert Timings.of_records([bad, record()]).seconds(SETTINGS) == 4
    assert seconds_of(record(0, 0)) == 0
