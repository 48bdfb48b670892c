"""The dashboard's pages: of a training its loss and its latest validation sheet, of a generation its failures."""

import base64
import io
import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flows import report
from flows.report import SECTIONS, THUMBNAIL_BYTES, generated_text, training_text, validation_text
from pusa.finetune.curve import SIZE, STRONG
from pusa.generate.stage import Generated
from pusa.ingest.stage import Ingested
from pusa.system.text import MAX_LINES, printable
from pusa.video.media import write_image
from tests.helpers.loss_curves import inked, noisy
from tests.helpers.pages import shown


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
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = shown("\n".join(lines))
    width = len(cells) // max(1, len(lines) - 1)  # the line below the names holds no text
    return [cells[i : i + width] for i in range(width, len(cells), max(1, width))]


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


HOSTILE = "![x](http://a.b/c.png)<img src=http://a.b> | `a` **b** www.a.b \x1b[2J\u202e\udcff"


def generated(folder, failed, sheet=None) -> Generated:
    path = folder / "gallery.jpg"
    write_image(path, np.zeros((1, 1, 3), np.uint8) if sheet is None else sheet)
    return Generated(folder, folder / "gallery.html", path, ["a"], [], failed)


def test_names_and_reasons_are_shown_as_they_are(tmp_path):
    text = generated_text(generated(tmp_path, {"b": HOSTILE}))
    assert len(pictures(text)) == 1
    assert f"b failed: {printable(HOSTILE)}" in shown(text.partition("![videos]")[0])
    folder = tmp_path / "a `b` | ![x](y) <i>"
    folder.mkdir()
    write_metrics(folder, [(1, 0.5)])
    assert shown(training_text(folder).partition("![loss]")[0]) == [f"{folder}, step 1"]


def test_the_page_of_a_generation_is_small_whatever_there_is_to_show(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (2400, 3000, 3), np.uint8)
    text = generated_text(generated(tmp_path, {f"job{i}": HOSTILE * 1000 for i in range(5000)}, noise))
    assert len(text) < 400_000 and text.count("failed: ") == MAX_LINES + 1  # the first of the counts
    assert "- and 4,950 more, each with its reason" in text and len(pictures(text)) == 1


def test_a_sheet_that_cannot_be_read_leaves_the_rest(tmp_path):
    result = generated(tmp_path, {"b": "no"})
    result.sheet.write_bytes(b"no picture")
    text = generated_text(result)
    assert "**b** failed: no" in text and "no picture: " in text
    result.sheet.unlink()
    assert "no picture: " in generated_text(result)


def test_a_page_that_cannot_be_made_or_sent_fails_nothing(tmp_path, monkeypatch, caplog):
    sent = []
    monkeypatch.setattr(report, "create_markdown_artifact", lambda text, key, description: sent.append((key, text)))
    result = Ingested(Path(HOSTILE), 1, 2, 3, 4, 5, 6, 7, {"kind": HOSTILE})
    report.ingest(result)
    assert [key for key, _ in sent] == ["ingest", "kinds"]
    assert table(sent[0][1]) == [["1", "2", "3", "7", "4", "5", "6", printable(result.table)]]
    assert table(sent[1][1]) == [["kind", printable(HOSTILE)]]

    def refuse(text, key, description):
        raise ValueError("the server\nrefuses")

    monkeypatch.setattr(report, "create_markdown_artifact", refuse)
    (tmp_path / "metrics.jsonl").mkdir()
    with caplog.at_level(logging.WARNING, "pusa.report"):
        report.ingest(result)
        report.finetune(tmp_path)
        report.generate(generated(tmp_path, {}))
    assert [record.getMessage() for record in caplog.records] == [
        f"the dashboard lacks {key!r}: ValueError: the server" for key in ("ingest", "kinds", "generate")
    ]
