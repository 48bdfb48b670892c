"""Drafts and `finish`: the same bytes as without drafts, whatever is chosen, killed, changed or done at once."""

import json
import os
import signal
from itertools import count
from pathlib import Path

import pytest
import torch
from PIL import Image

from pusa.generate.ledger import DRAFTS
from pusa.generate.stage import generate
from pusa.manifest.models import Drafts, GenerateManifest, ModelSpec
from pusa.system.files import sha256_file
from pusa.video.media import probe
from tests.generate.test_ledger import contents, in_child
from tests.helpers.stub_model import StubModel, manifest_of

STEPS = 5
SMALL = {"width": 64, "height": 64, "num_frames": 13, "steps": STEPS, "guidance": 2}
JOBS = (
    {"id": "a", "prompt": "a red ball"},
    {"id": "b", "prompt": "a blue box", "seed": 1},
    {"id": "c", "prompt": "a green cup", "seed": 2},
    {"id": "alone", "prompt": "a ball", "num_frames": 7},
    {"id": "ring", "task": "loop", "num_frames": 19},
    {"id": "segments", "task": "long_video", "num_frames": 43, "window": 31, "overlap": 2},
    {"id": "stairs", "task": "long_video", "num_frames": 25, "window": 31, "overlap": 2, "stagger": 2},
    {"id": "back", "task": "extension", "num_frames": 43, "window": 31, "direction": "backwards", "given": [0, 1], "video": 0},
    {"id": "few", "prompt": "a ball", "steps": 2},
    {"id": "more", "task": "extension", "given": [0], "video": "RUN/videos/alone.mp4"},
)  # fmt: skip


def real(*jobs, drafts: int | None = None, folder: Path, **keys) -> GenerateManifest:
    made = [{"task": "text_to_video", **SMALL, **job} for job in jobs]
    for job in made:
        if "video" in job:
            job["video"] = Path(job["video"] or folder / "clip.mp4")
    data = {"model": ModelSpec(weights="builtin:tiny-pusa"), "jobs": made, **keys}
    return GenerateManifest.model_validate({**data, "drafts": drafts and {"steps": drafts}})


def record(run: Path, id: str) -> dict:
    return json.loads((run / f"videos/{DRAFTS}/{id}.json").read_text())


@pytest.fixture(scope="module")
def clip(tmp_path_factory, drawn) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    (folder / "clip.mp4").write_bytes((drawn / "media/ball.mp4").read_bytes())
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory, clip) -> dict[str, bytes]:
    """Return the videos and latents of the real tiny model, of a run without drafts."""
    run = tmp_path_factory.mktemp("whole")
    result = generate(real(*JOBS, folder=clip), run)
    assert not result.failed
    return contents(run)


def test_drafts_are_shown_and_the_chosen_are_finished_with_the_same_bytes(tmp_path, whole, clip):
    manifest, run, videos = real(*JOBS, drafts=3, folder=clip), tmp_path, tmp_path / "videos"
    first = generate(manifest, run)
    ids = [job["id"] for job in JOBS]
    assert (first.made, first.left, first.failed) == (["few"], ["more"], {})
    assert first.drafted == [id for id in ids if id not in ("few", "more")]
    for id in first.drafted:
        about = record(run, id)
        assert about["status"] == "draft" and about["steps"] == 3 < about["total_steps"]
        assert about["video_sha256"] == sha256_file(videos / DRAFTS / f"{id}.mp4")
        assert not (videos / f"{id}.mp4").exists() and (videos / f"previews/{id}.jpg").is_file()
    frames = {id: probe(videos / DRAFTS / f"{id}.mp4").num_frames for id in first.drafted}
    assert frames == {"a": 13, "b": 13, "c": 13, "alone": 7, "ring": 13, "segments": 31, "stairs": 7, "back": 25}
    assert record(run, "segments")["shows"] == {"latent_frames": [0, 5], "of": 8}

    stamps = {path: path.stat().st_mtime_ns for path in (videos / DRAFTS).iterdir()}
    again = generate(manifest, run)
    assert (again.made, again.kept, again.drafted) == ([], ["few"], first.drafted)
    assert stamps == {path: path.stat().st_mtime_ns for path in (videos / DRAFTS).iterdir()}

    chosen = generate(manifest, run, chosen={"b", "more"})
    assert set(chosen.made) == {"b", "alone", "more"} and chosen.kept == ["few"]
    assert not list((videos / DRAFTS).glob("b.*")) and (videos / DRAFTS / "a.mp4").exists()
    assert (videos / ".work/a.state.safetensors").exists(), "a and c are continued from it"
    assert generate(manifest, run, chosen={"b"}).made == []
    rest = generate(manifest, run, chosen=set(ids))
    assert set(rest.made) == {"a", "c", "ring", "segments", "stairs", "back"} and not rest.drafted
    assert contents(run) == whole
    assert not list((videos / DRAFTS).iterdir()) and not list((videos / ".work").glob("*.safetensors"))
