"""The pages of the stages: what they show of tables, trainings and jobs, how large they are, and that they are safe."""

import base64
import io
import json
import os
import re
import shutil
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from PIL import Image
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import pictures
from flows.handover import ManifestFile
from flows.pictures import NEWEST, THUMBNAIL_BYTES, NewestVideos, previews_text
from flows.report import (
    COLUMNS,
    MAX_BYTES,
    SECTIONS,
    FinetunePage,
    GeneratePage,
    IngestPage,
    PrecomputePage,
    artifact_key,
    clips_text,
    failures_text,
    latents_text,
    made_by_text,
    training_text,
)
from pusa.data.reader import Table
from pusa.finetune.curve import SIZE, STRONG
from pusa.finetune.measurements import Measurement
from pusa.finetune.metrics import read_columns
from pusa.generate.stage import generate
from pusa.generate.summary import Made, Status
from pusa.manifest.models import FinetuneManifest
from pusa.system.progress import Progress
from pusa.system.text import MAX_LINES, printable
from pusa.video.animations import Animation
from pusa.video.media import write_image
from tests.helpers.loss_curves import inked, noisy
from tests.helpers.pages import shown
from tests.helpers.stub_model import StubModel, manifest_of

HOSTILE = "![x](http://a.b/c.png)<img src=http://a.b> | `a` **b** www.a.b \x1b[2J\u202e\udcff"
FILE = ManifestFile(path=Path("/manifests/a `b` | ![x](y)/m.yaml"))


def write_metrics(run_dir, points) -> None:
    rows = [
        {
            "step": step, "loss": loss, "learning_rate": 1e-5, "samples_per_second": 3.0, "seconds": 2.0, "waited": 0.5,
            **({"skipped": ["a", "b"]} if loss is None else {}),
        }
        for step, loss in points
    ]  # fmt: skip
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def training(run_dir) -> str:
    return training_text(read_columns(run_dir / "metrics.jsonl", COLUMNS))


def images(text: str, kind: str = "png|jpeg") -> list[Image.Image]:
    found = re.findall(rf"!\[\w+\]\(data:image/(?:{kind});base64,([^)]+)\)", text)
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


def without_images(text: str) -> str:
    return re.sub(r"!\[\w+\]\(data:image/\w+;base64,[^)]+\)", "", text)


def table(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = shown("\n".join(lines))
    width = len(cells) // max(1, len(lines) - 1)  # the line below the names holds no text
    return [cells[i : i + width] for i in range(width, len(cells), max(1, width))]


def test_a_key_is_that_of_a_manifest_in_a_folder_and_allowed_by_prefect():
    key = artifact_key("generate", Path("/m/Tiny Night/generate.yaml"), Path("/runs/a"))
    assert re.fullmatch(r"generate-tiny-night-[0-9a-f]{6}", key)
    others = [("/m/Tiny Night/b.yaml", "/runs/a"), ("/m/Tiny Night/generate.yaml", "/runs/b"), ("/\udcff/é", "/r")]
    keys = {key, *(artifact_key("generate", Path(path), Path(run)) for path, run in others)}
    assert len(keys) == 4 and all(re.fullmatch(r"[a-z0-9-]{1,80}", one) for one in keys)


@pytest.mark.parametrize(
    "points",
    [noisy(1), noisy(40, range(40)), noisy(300, {0, 17, 299}), noisy(5000), [(7, 1.0), (8, 1.0)]],
    ids=["one row", "all skipped", "some skipped", "5,000 rows", "a flat line"],
)
def test_the_text_of_any_training_is_small_and_has_a_picture(tmp_path, points):
    write_metrics(tmp_path, points)
    text = training(tmp_path)
    assert len(text) < 100_000 and "nan" not in without_images(text).lower()
    (picture,) = images(text)
    assert picture.size == SIZE
    assert bool(len(inked(picture, STRONG))) == any(loss is not None for _, loss in points)
    assert len(table(text)) <= SECTIONS


def test_the_table_of_a_training_summarises_each_section(tmp_path):
    write_metrics(tmp_path, [(1, 0.5), (2, 0.7), (3, None), *((step, 0.1) for step in range(4, 21))])
    rows = table(training(tmp_path))
    assert rows[0] == ["2", "0.6000", "1e-05", "3", "25%", "0"]
    assert rows[1] == ["4", "0.1000", "1e-05", "3", "25%", "1"]
    assert rows[-1][0] == "20" and len(rows) == SECTIONS


def test_metrics_of_an_older_trainer_or_none_are_shown(tmp_path):
    assert training(tmp_path) == "no step yet"
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5, "learning_rate": 0.1}\n')
    assert table(training(tmp_path)) == [["1", "0.5000", "0.1", "-", "-", "0"]]


def test_a_training_shows_its_pace_and_its_latest_sheet_made_smaller(tmp_path):
    manifest = FinetuneManifest.model_validate({"base": {"weights": "builtin:tiny"}, "steps": 40})
    page = FinetunePage(FILE, tmp_path, manifest, {"steps": "80"})
    assert page.look("").percent == 0 and "step 0 of 80; disk: " in page.look("").text()
    write_metrics(tmp_path, noisy(20))
    noise = np.random.default_rng(0).integers(0, 256, (2400, 3000, 3), np.uint8)
    for step in (1, 20, 10):
        write_image(tmp_path / f"validation/{step:08d}.jpg", noise if step == 20 else noise[:9, :9])
    look = page.look("")
    text = look.text()
    assert look.percent == 25 and "step 20 of 80, 2 min left" in text and "Validation at step 20: " in text
    _, sheet = images(text)
    assert len(text) < 1.4 * THUMBNAIL_BYTES + 100_000 and sheet.width > 300
    (tmp_path / "validation/00000020.jpg").write_bytes(b"no picture")
    assert "no picture: " in page.look("ended").text()


def test_a_training_shows_the_losses_of_held_out_clips_and_their_change(tmp_path):
    manifest = FinetuneManifest.model_validate({"base": {"weights": "builtin:tiny"}, "steps": 40})
    page = FinetunePage(FILE, tmp_path, manifest, {})
    write_metrics(tmp_path, noisy(20))
    path, before = tmp_path / "metrics.jsonl", page.look("")
    assert "held" not in before.text()
    for step, key, losses in (
        (0, "old", (9, 9)),
        (10, "new", (0.5, 0.3)),
        (20, "new", (0.3, None)),
        (30, "new", (0.2, 0.1)),
    ):
        row = Measurement(step, key, (0.2, 0.9), {"keyframes": losses, "extension": (1, 1)}).row()
        path.write_text(path.read_text() + json.dumps({"step": step, **row}) + "\n")
    look = page.look("")
    assert look.facts != before.facts
    text = look.text()
    start = text.index("| loss of held")
    cells = table(text[start : text.index("Each is the mean")])
    assert cells == [
        ["keyframes", "0.1500", "0.4000", "-62.5%"], ["extension", "1.0000", "1.0000", "+0.0%"],
        ["mean", "0.5750", "0.7000", "-17.9%"],
    ]  # fmt: skip
    assert "levels 0.2, 0.9, on" in text and "step 30" in shown(text[start:])[1]


@pytest.mark.parametrize("page, stage", [(IngestPage, "clips"), (PrecomputePage, "latents")])
def test_a_page_without_a_table_says_so_and_is_safe(tmp_path, page, stage):
    folder = tmp_path / "a `b` | <i>"
    made = page(FILE, folder)
    look = made.look("")
    assert look.percent is None and shown(look.text())[-1] == "no table yet"
    heading = shown(look.text())[0]
    assert "/m.yaml is running, " in heading and heading.endswith(f"in {folder}") and FILE.path.parent.name in heading
    (folder / stage).mkdir(parents=True)
    (folder / stage / "index.json").write_text('{"![x](y)')
    assert made.look("").facts != look.facts
    failed = made.look(f"failed: {HOSTILE}")
    assert "no table: " in shown(failed.text())[-1] and f"failed: {printable(HOSTILE)}, " in shown(failed.text())[0]


def test_tables_are_shown_with_their_rejects_by_reason(tmp_path, monkeypatch):
    facts = {
        "sources": 9, "retimed_frames": 2, "duplicates": 1, "near_duplicates": 0, "kinds": {"hdr": 3}, "clips": 7,
        "rejects_by_reason": {"too_short": 2, HOSTILE: 10},
    }  # fmt: skip
    opened = Table(tmp_path, {"clips": [{"rows": 8}], "rejects": [{"rows": 12}], "rows": [{"rows": 5}]}, facts)
    monkeypatch.setattr(Table, "open", lambda folder, part: opened)
    reasons = [[printable(HOSTILE), "10"], ["too_short", "2"]]
    first, second, third = clips_text(tmp_path).split("\n\n")
    assert table(first) == [["9", "8", "12", "0", "2", "1", "0", str(tmp_path)]] and table(second) == reasons
    assert table(third) == [["hdr", "3 sources: tone-mapped to SDR"]]
    first, second = latents_text(tmp_path).split("\n\n")
    assert table(first) == [["7", "5", "12", str(tmp_path)]] and table(second) == reasons


def test_progress_of_this_process_is_shown_until_the_end(tmp_path):
    page = IngestPage(FILE, tmp_path)
    page.progress["ingest"] = progress = Progress("ingest", 8)
    before = page.look("")
    progress.advance(2)
    look = page.look("")
    assert (look.percent, page.look("ended").percent) == (25, 100) and look.facts != before.facts
    assert "new sources: 2 of 8, " in look.text() and " left; disk: " in look.text()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with two videos and a job that fails."""
    folder = tmp_path_factory.mktemp("made")
    bad = {"id": "c", "task": "image_to_video", "image": folder / "![x](y) | none.png"}
    assert generate(manifest_of({"id": "a"}, {"id": "b"}, bad), folder, StubModel).made == ["a", "b"]
    for seconds, id in enumerate("ab"):  # two videos may be ended at the same time
        os.utime(folder / f"videos/{id}.json", (seconds, seconds))
    return folder


def page_of(folder: Path) -> GeneratePage:
    """Return the page of a run that has begun, with the list of jobs of its own."""
    listed = folder / "videos/.work/jobs.json"
    kept = listed.read_bytes()
    listed.unlink()
    page = GeneratePage(FILE, folder, ["a", "b", "c"])
    listed.write_bytes(kept)
    return page


def test_jobs_are_shown_by_state_with_who_made_them_failures_and_the_newest_videos(made):
    look = page_of(made).look("ended")
    text = look.text()
    assert look.percent == 100 and len(images(text, "webp")) == 2 and "http" not in without_images(text)
    cells = shown(without_images(text))
    assert cells[1].startswith("3 jobs: 2 done, 1 failed; disk: ")
    place = cells.index("work of the model") + 1
    assert cells[place].endswith(" cpu") and cells[place + 1] == "2"
    reason = cells[cells.index("c") + 1]
    assert "![x](y) | none.png" in reason
    newest = cells.index(f"the newest videos; all are in {made / 'videos/gallery.html'}") + 1
    assert cells[newest:] == ["b", "a", "", ""]


def test_jobs_that_an_earlier_run_listed_are_not_shown(made):
    page = GeneratePage(FILE, made, ["a", "b", "c"])
    assert page.look("").percent is None and "are checked; disk: " in page.look("").text()
    assert "they were not listed; disk: " in page.look("failed: no").text()


def test_the_percentage_counts_the_steps_of_the_jobs_that_are_left(made, tmp_path):
    folder = Path(shutil.copytree(made, tmp_path / "run", symlinks=True))
    (folder / "videos/b.json").unlink()
    page = page_of(folder)
    assert page.look("").percent == pytest.approx(100 * 2 / 3)
    page.progress["denoising steps"] = progress = Progress("denoising steps", 8)
    assert page.look("").percent == pytest.approx(100 * 2 / 3)
    progress.advance(4)
    assert page.look("").percent == pytest.approx(100 * 5 / 6)
    assert "denoising steps of this run: 4 of 8, " in page.look("").text()


def test_failures_are_cut_and_hosts_are_safe():
    failed = dict.fromkeys((f"job{i}" for i in range(5000)), HOSTILE * 1000)
    text = failures_text(Status({}, failed, {}, 0, None))
    assert len(text) < 200_000 and len(table(text)) == MAX_LINES and "and 4,950 more, each with" in text
    assert table(text)[0] == ["job0", printable(HOSTILE * 1000)]
    made = {"a": Made(1, HOSTILE, 30.0), "b": Made(2, HOSTILE, 45.0), "c": Made(3, "", None)}
    assert table(made_by_text(made)) == [[printable(HOSTILE), "2", "1 min"], ["not recorded", "1", "-"]]


@pytest.mark.parametrize("room, frames", [(MAX_BYTES, [24] * 6), (200_000, [12] * 6), (14_000, []), (9_000, None)])
def test_pictures_lose_frames_then_are_left_out_so_that_a_page_keeps_its_size(tmp_path, monkeypatch, room, frames):
    animation = Animation(np.random.default_rng(0).integers(0, 256, (24, 60, 40, 3), np.uint8), 1.0)
    monkeypatch.setattr(pictures.Animation, "read", lambda path: animation)
    made = {f"{i:03d}" + "-" * 100: Made(i, "", None) for i in range(20)}
    text = NewestVideos(tmp_path).text(made, room)
    assert len(text.encode()) <= room
    if frames is None:
        assert text == ""
    else:
        assert [one.n_frames for one in images(text, "webp")] == frames
        assert text.count("no room for a picture") == NEWEST - len(frames) and "019" in text and "013" not in text


def test_what_jobs_at_work_become_is_shown_newest_first_and_small(tmp_path):
    assert previews_text(tmp_path, ["a", "b"], 0) == ""
    noise = np.random.default_rng(0).integers(0, 256, (160, 960, 3), np.uint8)
    for number in range(9):
        write_image(path := tmp_path / f"previews/job{number}.jpg", noise)
        os.utime(path, (100 + number, 100 + number))
    (tmp_path / "previews/job7.jpg").write_bytes(b"no picture")
    os.utime(tmp_path / "previews/job7.jpg", (200, 200))
    text = previews_text(tmp_path, [f"job{number}" for number in (*range(7), 7, 99, 8)], 104)
    assert [cell for cell in re.findall(r"job\d+(?= )", without_images(text))] == [
        "job7",
        "job8",
        "job6",
        "job5",
        "job4",
    ]
    found = images(text, "jpeg")
    assert len(found) == 4 and len(text) < 6 * 41_000 and all(one.width <= 480 for one in found)
    assert "no picture: " in text


def test_a_video_that_cannot_be_read_leaves_the_rest(made, tmp_path):
    folder = Path(shutil.copytree(made, tmp_path / "run", symlinks=True))
    (folder / "videos/b.mp4").write_bytes(b"no video")
    text = page_of(folder).look("").text()
    assert len(images(text, "webp")) == 1 and "no picture" in text


@pytest.mark.parametrize("is_same", [True, False])
def test_videos_are_linked_where_the_server_serves_these_very_files(made, tmp_path, is_same):
    site = tmp_path / "site"
    (site / "runs").parent.mkdir()
    if is_same:
        (site / "runs").symlink_to("/")
    else:  # another file of the same path
        there = site / f"runs{made}/videos"
        there.mkdir(parents=True)
        for id in "ab":
            (there / f"{id}.mp4").write_bytes(b"other")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(site))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        origin = f"127.0.0.1:{server.server_port}"
        with temporary_settings({PREFECT_API_URL: f"http://user:secret@{origin}/api"}):
            text = page_of(made).look("ended").text()
        server.shutdown()
    links = re.findall(r"\]\((http[^)]+)\)", text)
    expected = [f"http://{origin}/runs{made}/videos/{name}" for name in ("gallery.html", "b.mp4", "a.mp4")]
    assert links == (expected if is_same else []) and "secret" not in text
