"""The dashboard's page of a training: its loss as a picture and in numbers, and the latest validation sheet."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from flows.report import SECTIONS, THUMBNAIL_BYTES, training_text, validation_text
from pusa.finetune.curve import SIZE, STRONG
from pusa.video.media import write_image
from tests.helpers.loss_curves import inked, noisy


def write_metrics(run_dir, points) -> None:
    rows = [
        {
            "step": step, "loss": loss, "learning_rate": 1e-5, "samples_per_second": 3.0, "seconds": 2.0, "waited": 0.5,
            **({"skipped": ["a", "b"]} if loss is None else {}),
        }
        for step, loss in points
    ]  # fmt: skip
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def pictures(text: str) -> list[Image.Image]:
    found = re.findall(r"!\[\w+\]\(data:image/(?:png|jpeg);base64,([^)]+)\)", text)
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


def table(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize(
    "points",
    [noisy(1), noisy(40, range(40)), noisy(300, {0, 17, 299}), noisy(5000), [(7, 1.0), (8, 1.0)]],
    ids=["one row", "all skipped", "some skipped", "5,000 rows", "a flat line"],
)
def test_the_text_of_any_run_is_small_and_has_a_picture(tmp_path, points):
    write_metrics(tmp_path, points)
    text = training_text(tmp_path)
    assert len(text) < 100_000 and "nan" not in text.lower().split("base64")[0]
    (picture,) = pictures(text)
    assert picture.size == SIZE
    assert bool(len(inked(picture, STRONG))) == any(loss is not None for _, loss in points)
    assert len(table(text)) <= SECTIONS


def test_the_table_summarises_each_section(tmp_path):
    write_metrics(tmp_path, [(1, 0.5), (2, 0.7), (3, None), *((step, 0.1) for step in range(4, 21))])
    rows = table(training_text(tmp_path))
    assert rows[0] == ["2", "0.6000", "1e-05", "3", "25%", "0"]
    assert rows[1] == ["4", "0.1000", "1e-05", "3", "25%", "1"]
    assert rows[-1][0] == "20" and len(rows) == SECTIONS


def test_metrics_of_an_older_trainer_or_none_are_shown(tmp_path):
    assert "no step yet" in training_text(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5, "learning_rate": 0.1}\n')
    assert table(training_text(tmp_path)) == [["1", "0.5000", "0.1", "-", "-", "0"]]


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
