"""A nearly full disk pauses the work, which continues by itself once there is room."""

import logging
from pathlib import Path

import pytest

from pusa.finetune.stage import finetune
from pusa.generate.stage import generate
from pusa.ingest.stage import ingest
from pusa.manifest.models import ClipSettings, IngestManifest, PrecomputeManifest
from pusa.precompute.stage import precompute
from pusa.system import disk
from pusa.system.disk import GIB, Room, free_bytes, shortage
from tests.helpers.media import video
from tests.helpers.stub_model import StubModel, manifest_of
from tests.helpers.training_runs import TINY, recipe


@pytest.fixture
def free(monkeypatch):
    """Return a list: what is free at each look, in GiB, the last for ever. The pauses are short."""
    left: list[float] = []
    monkeypatch.setattr(disk, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(disk, "free_bytes", lambda folder: (left.pop(0) if len(left) > 1 else left[0]) * GIB)
    return left


def test_the_work_pauses_until_there_is_room_and_says_so_once(free, caplog):
    caplog.set_level(logging.INFO, logger="pusa")
    free += [0.4, 0.45, 0.5, 1]
    Room(Path("/data"), 1.0).wait()
    assert free == [1]
    assert [record.getMessage() for record in caplog.records] == [
        "paused: 0.4 GiB free of 1 in /data; the work continues once there is room (min_free_gib)",
        "there is room again in /data: the work continues",
    ]


def test_the_warning_is_repeated_after_some_minutes(free, caplog, monkeypatch):
    monkeypatch.setattr(disk, "SECONDS_BETWEEN_WARNINGS", 0.0)
    free += [0.4, 0.4, 0.4, 1]
    Room(Path("/data"), 1.0).wait()
    assert caplog.text.count("paused: ") == 3


def test_no_limit_and_a_disk_that_cannot_be_asked_do_not_pause(free, monkeypatch):
    free += [0]
    Room(Path("/data"), 0.0).wait()

    def fails(folder: Path) -> int:
        raise OSError("gone")

    monkeypatch.setattr(disk, "free_bytes", fails)
    Room(Path("/data"), 1.0).wait()
    assert shortage(Path("/data"), 1.0) == ""


def test_work_is_given_once_there_is_room_and_its_end_at_once(free):
    free += [0, 0, 5, 0]
    items = ["a", None]
    take = Room(Path("/data"), 1.0).before(lambda: items.pop(0))
    assert take() == "a" and free == [0]
    assert take() is None


def test_the_free_space_of_a_folder_that_is_not_there_yet_is_that_of_its_disk(tmp_path):
    assert free_bytes(tmp_path / "run/videos") > 0
    assert "GiB free of 1e+06 in " in shortage(tmp_path / "run/videos", 1e6)


@pytest.fixture
def filling(monkeypatch):
    """Let the disk be too full for the first two looks; return the folders that were looked at."""
    looks: list[Path] = []

    def free(folder: Path) -> float:
        looks.append(folder)
        return (0.5 if len(looks) < 3 else 2) * disk.GIB

    monkeypatch.setattr(disk, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(disk, "free_bytes", free)
    return looks


SLOW = pytest.mark.slow
STAGES = ["clips", "videos", pytest.param("latents", marks=SLOW), pytest.param("checkpoints", marks=SLOW)]


@pytest.mark.parametrize("folder", STAGES)
def test_a_stage_pauses_before_it_writes_more(folder, filling, request, tmp_path, caplog):
    made = request.getfixturevalue("made") if folder in ("latents", "checkpoints") else tmp_path
    filling.clear()  # what `made` looked at
    if folder == "clips":
        video(tmp_path / "in/a.mp4", count=8)
        (tmp_path / "in/a.txt").write_text("words")
        clips = ClipSettings(width=64, height=64, num_frames=7)
        ingest(IngestManifest(source=str(tmp_path / "in"), clips=clips), tmp_path)
    elif folder == "videos":
        generate(manifest_of({"id": "a"}, {"id": "b"}), tmp_path, StubModel)
    elif folder == "latents":
        precompute(PrecomputeManifest(model=TINY, clips=made / "clips"), tmp_path)
    else:
        finetune(recipe(made, steps=1), tmp_path)
    assert len(filling) >= 3 and set(filling) == {tmp_path / folder}
    assert caplog.text.count(f"paused: 0.5 GiB free of 1 in {tmp_path / folder}") == 1
