"""What the dashboard shows of a training: its loss as a picture and in numbers, and the latest validation sheet."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from flows.report import STRETCHES, THUMBNAIL_BYTES, training_text, validation_text
from pusa.finetune.curve import BAD, BUCKETS, FAINT, SIZE, STRONG, extremes, loss_curve, running_mean, ticks
from pusa.video.media import write_image


def noisy(count: int, skipped=()) -> list[tuple[int, float | None]]:
    dice = np.random.default_rng(0)
    losses = 0.4 + np.exp(-np.arange(count) / count) + 0.1 * dice.standard_normal(count)
    return [(i + 1, None if i in skipped else float(loss)) for i, loss in enumerate(losses)]


def write_metrics(run_dir, points) -> None:
    rows = [
        {
            "step": step, "loss": loss, "learning_rate": 1e-5, "samples_per_second": 3.0, "seconds": 2.0, "waited": 0.5,
            **({"skipped": ["a", "b"]} if loss is None else {}),
        }
        for step, loss in points
    ]  # fmt: skip
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def drawn(points) -> Image.Image:
    steps, losses = np.array([(step, np.nan if loss is None else loss) for step, loss in points]).T
    return loss_curve(steps, losses)


def pictures(text: str) -> list[Image.Image]:
    found = re.findall(r"!\[\w+\]\(data:image/(?:png|jpeg);base64,([^)]+)\)", text)
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


def inked(picture: Image.Image, colour) -> np.ndarray:
    """The columns and rows where a colour is, more or less."""
    near = np.abs(np.asarray(picture.convert("RGB"), int) - colour).sum(-1) < 40
    near[:30] = False  # the legend
    return np.argwhere(near)[:, ::-1]


def table(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize(
    "points",
    [noisy(1), noisy(40, range(40)), noisy(300, {0, 17, 299}), noisy(5000), [(7, 1.0), (8, 1.0)]],
    ids=["one row", "all skipped", "some skipped", "5,000 rows", "a flat line"],
)
def test_any_run_becomes_a_small_text_with_a_picture(tmp_path, points):
    write_metrics(tmp_path, points)
    text = training_text(tmp_path)
    assert len(text) < 100_000 and "nan" not in text.lower().split("base64")[0]
    (picture,) = pictures(text)
    assert picture.size == SIZE
    assert bool(len(inked(picture, STRONG))) == any(loss is not None for _, loss in points)
    assert len(table(text)) <= STRETCHES


def test_the_numbers_are_those_of_the_stretches(tmp_path):
    write_metrics(tmp_path, [(1, 0.5), (2, 0.7), (3, None), *((step, 0.1) for step in range(4, 21))])
    rows = table(training_text(tmp_path))
    assert rows[0] == ["2", "0.6000", "1e-05", "3", "25%", "0"]
    assert rows[1] == ["4", "0.1000", "1e-05", "3", "25%", "1"]
    assert rows[-1][0] == "20" and len(rows) == STRETCHES


def test_a_run_of_an_older_trainer_or_none_is_no_error(tmp_path):
    assert "no step yet" in training_text(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5, "learning_rate": 0.1}\n')
    assert table(training_text(tmp_path)) == [["1", "0.5000", "0.1", "-", "-", "0"]]


def test_the_curve_falls_where_the_loss_falls():
    places = inked(drawn(noisy(1000)), STRONG)
    left, right = (places[order][:, 1].mean() for order in (places[:, 0] < 200, places[:, 0] > 800))
    assert right > left + 100  # pixels are counted from the top


def test_one_wild_step_does_not_squeeze_the_rest():
    wild = noisy(1000)
    wild[500] = (501, 50.0)
    heights = [np.ptp(inked(drawn(points), FAINT)[:, 1]) for points in (noisy(1000), wild)]
    assert heights[1] > 0.9 * heights[0] > 200


def test_the_line_is_broken_where_steps_were_skipped():
    picture = drawn(noisy(300, range(100, 200)))
    columns = set(inked(picture, STRONG)[:, 0].tolist())
    assert not columns & set(range(380, 600)) and {200, 800} & columns


def test_a_long_run_is_drawn_from_a_bounded_number_of_points_that_show_what_is_far_off():
    losses = np.random.default_rng(0).random(300_001)
    losses[[7, 123_456, 300_000]] = 5, -3, 9
    seen = extremes(losses)
    assert len(seen) <= 2 * BUCKETS and (np.diff(seen) > 0).all()
    assert {7, 123_456, 300_000} <= set(seen.tolist())
    losses[100_000:200_000] = np.nan
    assert not np.isfinite(losses[extremes(losses)]).all()
    assert extremes(losses[: 2 * BUCKETS]).tolist() == list(range(2 * BUCKETS))


def test_a_long_runs_curve_looks_as_that_of_every_step(monkeypatch):
    count = 20 * BUCKETS
    points = noisy(count, {9, *range(count // 2, count // 2 + count // 10)})
    short = drawn(points)
    monkeypatch.setattr("pusa.finetune.curve.extremes", lambda values: np.arange(len(values)))
    whole = drawn(points)
    assert np.abs(np.asarray(short, int) - np.asarray(whole)).mean() < 2
    columns = [set(inked(picture, BAD)[:, 0].tolist()) for picture in (short, whole)]
    assert columns[0] == columns[1] and len(columns[0]) > SIZE[0] / 20


def test_the_running_mean_is_that_of_the_known_neighbours():
    losses = np.array([1.0, 3.0, np.nan, 5.0, 7.0, np.nan, np.nan, np.nan])
    expected = [2.0, 2.0, 4.0, 6.0, 6.0, 7.0, np.nan, np.nan]
    np.testing.assert_allclose(running_mean(losses, 1), expected)
    np.testing.assert_allclose(running_mean(losses, 0), losses)


@pytest.mark.parametrize("low, high", [(0, 1), (0.31, 0.36), (-2, 1), (1, 163), (0, 1e-9), (1e6, 3e6), (0, 9.99)])
def test_ticks_are_few_and_within(low, high):
    found = ticks((low, high))
    assert 2 <= len(found) <= 6
    assert low - 1e-12 <= found[0] and found[-1] <= high * (1 + 1e-9)
    np.testing.assert_allclose(np.diff(found), found[1] - found[0])


def test_the_latest_validation_sheet_is_shown(tmp_path):
    assert validation_text(tmp_path) is None
    for step, colour in ((0, 0), (200, 200), (100, 100)):
        write_image(tmp_path / f"validation/{step:08d}.jpg", np.full((90, 120, 3), colour, np.uint8))
    text = validation_text(tmp_path)
    (picture,) = pictures(text)
    assert text.startswith("Step 200: ") and picture.size == (120, 90) and picture.getpixel((5, 5)) == (200,) * 3


def test_a_large_validation_sheet_is_scaled_down(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (2400, 3000, 3), np.uint8)
    write_image(tmp_path / "validation/00000100.jpg", noise)
    text = validation_text(tmp_path)
    assert len(text) < 1.4 * THUMBNAIL_BYTES < 300_000 and pictures(text)[0].width > 300
