"""Each step is recorded exactly once, after kills and disk errors too."""

import json
import os
import re
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pusa.finetune.metrics import MetricsWriter, StepMetrics, read_columns, read_losses, read_metrics


def measured(step: int, loss: float | None = None) -> StepMetrics:
    return StepMetrics(
        step=step,
        loss=1 / step if loss is None else loss,
        learning_rate=1e-4 * step,
        grad_norm=2.0,
        by_level=(0.5, *[None] * 8, 0.25),
        samples=8,
        tokens=4000,
        seconds=2.0,
        waited=0.5,
        memory=3 * 2**29,
    )


SKIPPED = {"loss": None, "grad_norm": float("inf"), "skipped": ("a.mp4@0", "b.mp4@7")}


def losses(path: Path) -> list[tuple[int, float | None]]:
    return list(read_losses(path))


def train(run_dir, start: int, end: int, scale: float = 1.0):
    with MetricsWriter(run_dir, start) as metrics:
        for step in range(start + 1, end + 1):
            metrics.add(measured(step, scale / step))


def age(run_dir) -> Path:
    """TensorBoard reads event files by the second they were begun in: make a killed run's one an hour older."""
    (path,) = (run_dir / "tensorboard").iterdir()
    begun = re.search(r"tfevents\.(\d+)", path.name)[1]
    return path.rename(path.with_name(path.name.replace(begun, str(int(begun) - 3600))))


def curve(run_dir, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run_dir / "tensorboard"), {"scalars": 0}).Reload()
    return [(event.step, round(event.value, 5)) for event in events.Scalars(name)]


def test_a_line_is_flushed_at_each_step(tmp_path):
    with MetricsWriter(tmp_path, 0) as metrics:
        for step in (1, 2):
            metrics.add(measured(step))
            assert losses(metrics.path) == [(done, 1 / done) for done in range(1, step + 1)]
    assert next(read_metrics(tmp_path / "metrics.jsonl")) == {
        "step": 1, "loss": 1.0, "learning_rate": 1e-4, "grad_norm": 2.0, "by_level": [0.5, *[None] * 8, 0.25],
        "seconds": 2.0, "waited": 0.5, "samples_per_second": 4.0, "tokens_per_second": 2000.0,
        "memory_bytes": 3 * 2**29,
    }  # fmt: skip


def test_steps_made_again_are_recorded_once(tmp_path):
    """Killed after step 9, the last checkpoint at 5."""
    train(tmp_path, 0, 9)
    train(tmp_path, 5, 12, scale=2.0)
    assert losses(tmp_path / "metrics.jsonl") == [(step, (1 if step <= 5 else 2) / step) for step in range(1, 13)]


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b"\0" * 40, b'{"step": 3, "loss": 1.0, "note": "\xff', b"12"])
def test_a_torn_line_is_dropped(tmp_path, torn):
    train(tmp_path, 0, 2)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + torn)
    assert losses(path) == [(1, 1.0), (2, 0.5)]
    train(tmp_path, 2, 4)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


def test_a_file_with_other_lines_is_kept_by_another_name(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("pusa.finetune.metrics.MAX_LINE", 1000)
    train(tmp_path, 0, 2)
    assert not caplog.text
    path = tmp_path / "metrics.jsonl"
    long = b" " * 1500 + b'{"step": 2, "loss": 9.0}\n'  # its end would be a row
    before = path.read_bytes() + b'[1]\n"a"\n\xff\n' + b"[" * 900 + b"\n" + long + b'{"step": 3, "lo'
    path.write_bytes(before)
    for name in ("metrics.jsonl", "metrics.jsonl.torn"):
        (tmp_path / f".partial-0123-{name}").touch()  # of a process that was killed
    train(tmp_path, 2, 4)
    assert "5 lines are not those of a step, the first is line 3; the file is kept as metrics.jsonl.torn" in caplog.text
    assert (tmp_path / "metrics.jsonl.torn").read_bytes() == before
    assert losses(path) == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25)] and not list(tmp_path.glob(".partial*"))


def test_a_link_by_the_name_of_the_file_is_replaced(tmp_path):
    (tmp_path / "mine").write_text("mine\n")
    (tmp_path / "metrics.jsonl").symlink_to("mine")
    train(tmp_path, 0, 1)
    assert (tmp_path / "mine").read_text() == "mine\n" and losses(tmp_path / "metrics.jsonl") == [(1, 1.0)]


def test_kept_lines_keep_every_byte(tmp_path):
    train(tmp_path, 0, 7, scale=1 / 3)
    before = (tmp_path / "metrics.jsonl").read_text()
    train(tmp_path, 7, 7)
    assert (tmp_path / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
def test_a_skipped_step_names_its_clips_and_no_line_holds_nan(tmp_path, bad):
    with MetricsWriter(tmp_path, 0) as metrics:
        metrics.add(measured(1))
        metrics.add(replace(measured(2), **{**SKIPPED, "loss": bad}))
        metrics.add(replace(measured(3), by_level=(bad,) * 10))
    rows = [json.loads(line, parse_constant=pytest.fail) for line in metrics.path.read_text().splitlines()]
    assert losses(metrics.path) == [(1, 1.0), (2, None), (3, 1 / 3)]
    assert [row.get("skipped") for row in rows] == [None, ["a.mp4@0", "b.mp4@7"], None]
    assert rows[1]["grad_norm"] is None and rows[2]["by_level"] == [None] * 10
    assert curve(tmp_path, "skipped") == [(1, 0), (2, 1), (3, 0)]
    assert [step for step, _ in curve(tmp_path, "loss")] == [1, 3]


def test_lines_of_another_writer_are_read_where_possible(tmp_path):
    """NaN, as Python's json writes it by default, and rows without a loss."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n{"step": 2}\n[3]\n{"no": "step"}\n')
    train(tmp_path, 2, 3)
    assert losses(tmp_path / "metrics.jsonl") == [(1, None), (2, None), (3, 1 / 3)]


ODD = [
    '{"step": 1, "loss": 1e999, "grad_norm": -1e999}',
    '{"step": 2,"loss":0.1000000000000000055,   "note": "\\ud800"}',
    '{"step": 3, "loss": "much", "seconds": [1], "waited": true}',
    '{"step": 4, "loss": 1%s}' % ("0" * 400),
]
LOST = ['{"step": 1%s}' % ("0" * 400), '{"step": true}', '{"step": -1}', "[" * 100_000, '{"step": "5"}', "null"]


def test_kept_lines_stay_as_they_are_whatever_they_hold(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(line for pair in zip(ODD, LOST, strict=False) for line in pair))  # its last line unended
    train(tmp_path, 4, 5)
    assert path.read_text().splitlines()[:-1] == ODD
    assert losses(path) == [(1, None), (2, 0.1), (3, None), (4, None), (5, 0.2)]


def test_columns_are_numbers_or_nan(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("\n".join(ODD))
    columns = read_columns(tmp_path / "metrics.jsonl", ("step", "loss", "seconds"))
    np.testing.assert_array_equal(columns["step"], [1, 2, 3, 4])
    np.testing.assert_array_equal(columns["loss"], [np.nan, 0.1, np.nan, np.nan])
    np.testing.assert_array_equal(columns["seconds"], [np.nan] * 4)
    assert [len(column) for column in read_columns(tmp_path / "none.jsonl", ("step", "loss")).values()] == [0, 0]


def test_a_long_file_is_never_in_memory_as_a_whole(tmp_path):
    """The lines are 20 MB; as rows they would take several times as much."""
    row = {"step": 1, "by_level": [i / 7 for i in range(10)], "note": "x" * 200}
    line = json.dumps(row).replace('"step": 1', '"step": %d') + "\n"
    (tmp_path / "metrics.jsonl").write_text("".join(line % step for step in range(50_000)))
    train(tmp_path, 49_000, 49_001)  # so that imports are not counted below
    tracemalloc.start()
    try:
        train(tmp_path, 49_000, 49_001)
        read_columns(tmp_path / "metrics.jsonl", ("step", "loss"))
        assert len(losses(tmp_path / "metrics.jsonl")) == 49_001  # row 0 is no step
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_tensorboard_reads_every_curve(tmp_path):
    train(tmp_path, 0, 3)
    assert curve(tmp_path, "loss") == [(1, 1.0), (2, 0.5), (3, 0.33333)]
    last = {
        "loss_by_level/0.0-0.1": 0.5, "loss_by_level/0.9-1.0": 0.25, "grad_norm": 2, "learning_rate": 0.0003,
        "samples_per_second": 4, "tokens_per_second": 2000, "data_wait": 0.25, "memory_gib": 1.5, "skipped": 0,
    }  # fmt: skip
    for name, value in last.items():
        assert curve(tmp_path, name)[-1] == (3, value), name
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tags()["scalars"]
    assert set(found) == {"loss", *last}


def test_tensorboard_shows_steps_made_again_once(tmp_path):
    train(tmp_path, 0, 9)
    age(tmp_path)
    train(tmp_path, 5, 12, scale=2.0)
    steps = range(1, 13)
    assert curve(tmp_path, "loss") == [(step, round((1 if step <= 5 else 2) / step, 5)) for step in steps]


def test_tensorboard_reads_a_file_that_a_kill_tore(tmp_path):
    train(tmp_path, 0, 9)
    events = age(tmp_path)
    events.write_bytes(events.read_bytes()[:-30])
    train(tmp_path, 5, 12, scale=2.0)
    assert [step for step, _ in curve(tmp_path, "loss")] == list(range(1, 13))


def test_curves_that_cannot_be_written_are_logged_once_and_training_continues(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("in the way")
    train(tmp_path, 0, 50)
    (tmp_path / "tensorboard").unlink()
    with MetricsWriter(tmp_path, 50) as metrics, open("/dev/full", "wb") as full:
        metrics.add(measured(51))
        (events,) = (tmp_path / "tensorboard").iterdir()
        (handle,) = (link.name for link in Path("/proc/self/fd").iterdir() if link.resolve() == events)
        os.dup2(full.fileno(), int(handle))  # the disk is full from here on
        for step in range(52, 101):
            metrics.add(measured(step))
    assert len(losses(metrics.path)) == 100
    assert ["gets no more curves, training continues" in record.message for record in caplog.records] == [True, True]
    assert "No space left on device" in caplog.text and curve(tmp_path, "loss") == [(51, round(1 / 51, 5))]


def test_lines_that_cannot_be_written_are_an_error(tmp_path):
    """They are part of the run's state."""
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(OSError, match=r"metrics\.jsonl"), MetricsWriter(tmp_path, 0):
        pass


def test_importing_metrics_does_not_import_torch():
    code = "import sys, pusa.finetune.metrics; print([m for m in ('torch', 'tensorboard') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
