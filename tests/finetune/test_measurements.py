"""Measurements of held-out clips are read back as they were written, and compared only with their like."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pusa.finetune.measurements import Measurement, comparable, count_since_best, find_best, read_measurements
from pusa.finetune.metrics import MetricsWriter, read_columns, read_losses
from tests.finetune.test_metrics import curve, measured


def measurement(step: int, *losses: float | None, key: str = "k") -> Measurement:
    return Measurement(step, key, (0.2, 0.8), {"keyframes": losses, "extension": (0.5, 0.7)})


def test_a_value_is_a_mean_over_levels_and_over_patterns():
    one = measurement(1, 0.1, 0.3)
    assert one.values() == pytest.approx({"keyframes": 0.2, "extension": 0.6, "mean": 0.4})
    unknown = measurement(1, 0.1, None)
    assert (unknown.value("keyframes"), unknown.value("mean"), unknown.value("independent")) == (None, None, None)
    assert unknown.value("extension") == pytest.approx(0.6)


@given(st.lists(st.sampled_from([0.1, 0.2, 0.3, None]), max_size=9))
def test_the_best_is_the_first_of_the_lowest(values):
    steps = [measurement(5 * step, value, value) for step, value in enumerate(values)]
    best, known = find_best(steps, "keyframes"), [value for value in values if value is not None]
    if not known:
        assert best is None and count_since_best(steps, "keyframes") == len(values)
        return
    assert best.step == 5 * values.index(min(known))
    assert count_since_best(steps, "keyframes") == len(values) - 1 - values.index(min(known))
    assert find_best(steps, "keyframes", [best.step]) == best and find_best(steps, "keyframes", []) is None


def test_only_measurements_of_the_same_settings_compare():
    steps = [measurement(1, 0.1, 0.1), measurement(2, 0.4, 0.4, key="new"), measurement(3, 0.3, 0.3, key="new")]
    assert [one.step for one in comparable(steps)] == [2, 3] and [one.step for one in comparable(steps, "k")] == [1]
    assert comparable([]) == comparable(steps, "none") == []


def test_measurements_are_part_of_the_steps_rows_and_step_0_is_no_step(tmp_path):
    start, second = measurement(0, 0.5, 0.25), measurement(2, 0.4, float("nan"))
    with MetricsWriter(tmp_path, 0) as metrics:
        metrics.add_start(start)
        metrics.add(measured(1))
        metrics.add(measured(2), second)
    path = tmp_path / "metrics.jsonl"
    assert [one.step for one in read_measurements(path)] == [0, 2] and len(read_measurements(path, 1)) == 1
    assert read_measurements(path)[0].row() == start.row()
    assert read_measurements(path)[1].losses["keyframes"] == [0.4, None]
    assert list(read_losses(path)) == [(1, 1.0), (2, 0.5)]
    assert read_columns(path, ("step", "loss"))["step"].tolist() == [1, 2]
    assert json.loads(path.read_text().splitlines()[0]) == {"step": 0, **start.row()}

    assert curve(tmp_path, "validation/keyframes/0.2") == [(0, 0.5), (2, 0.4)]
    assert curve(tmp_path, "validation/keyframes/0.8") == [(0, 0.25)]
    assert curve(tmp_path, "validation/mean") == [(0, 0.4875)]
    assert curve(tmp_path, "validation/extension") == [(0, 0.6), (2, 0.6)]
    assert [step for step, _ in curve(tmp_path, "skipped")] == [1, 2]


ODD = [
    {"validation": {"a": [0.1, 0.2]}, "validation_levels": [0.5], "validation_key": "k"},
    {"validation": {"a": [0.1], "b": []}, "validation_levels": [0.5], "validation_key": "k"},
    {"validation": {}, "validation_levels": [0.5], "validation_key": "k"},
    {"validation": {"a": ["much"]}, "validation_levels": [0.5], "validation_key": "k"},
    {"validation": {"a": [0.1]}, "validation_levels": [0.5]},
    {"validation": [1], "validation_levels": None, "validation_key": "k"},
    {"note": "validation"},
]


def test_lines_of_another_shape_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = {"step": 9, **measurement(9, 0.1, 0.2).row()}
    path.write_text("".join(json.dumps({"step": 1, **row}) + "\n" for row in ODD) + json.dumps(good)[:-9] + "\n")
    assert read_measurements(path) == [] == read_measurements(tmp_path / "none")
    path.write_text(path.read_text() + json.dumps(good) + "\n")
    assert [one.step for one in read_measurements(path)] == [9]
