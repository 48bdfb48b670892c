"""What a record says about how a video was made, and that reading another job's lossless file has its order."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pusa.errors import ManifestError
from pusa.generate.check import check_jobs
from pusa.generate.records import describe_levels, describe_model
from pusa.generate.stage import generate
from pusa.manifest.loading import load_manifest
from pusa.manifest.models import ModelSpec
from pusa.system.files import sha256_file
from pusa.video import formats
from pusa.video.media import read_frames
from pusa.weights.source import MAX_FACTS, Adapter, PartFiles
from tests.helpers.stub_model import StubModel, manifest_of


@pytest.fixture
def picture(drawn) -> Path:
    return drawn / "media/ball-first.png"


def record_of(run, id):
    return json.loads((run / f"videos/{id}.json").read_text())


def test_a_record_says_what_its_video_was_made_of_and_with(tmp_path, picture):
    job = {"id": "a", "task": "image_to_video", "image": picture, "num_frames": 13, "steps": 4, "multiplier": 0.3}
    generate(manifest_of({**job, "formats": ("webm",)}), tmp_path, StubModel)
    record = record_of(tmp_path, "a")
    assert record["model"] == {"backbone": "mochi", "weights": "builtin:tiny"}
    levels = record["levels"]
    assert (levels["given"], levels["starts"]) == ({"0": 0.3}, [0, 0, 0])
    assert levels["schedule"] == sorted(levels["schedule"], reverse=True) and len(levels["schedule"]) == 5
    assert (levels["schedule"][0], levels["schedule"][-1]) == (1, 0)
    assert record["inputs"] == {str(picture): sha256_file(picture)}
    assert record["versions"].keys() == {"pusa", "torch", "diffusers", "transformers", "ffmpeg", "python"}
    assert record["lineage"].keys() == {"transformer", "vae"}
    assert record["seconds"].keys() == {"encode", "sample", "decode"}
    assert record["hashes"].keys() == {"mp4", "latents", "webm"} and record["hashes"]["mp4"] == record["video_sha256"]
    assert record["made_at"].endswith("+00:00") and record["device"] == "cpu" and record["made_by"]


def test_levels_are_those_of_the_last_pass_with_all_that_is_given(picture):
    model = StubModel(ModelSpec(weights="builtin:tiny"))
    (loop,) = manifest_of({"id": "a", "task": "loop", "num_frames": 25, "image": picture}).jobs
    levels = describe_levels(loop, model.backbone.geometry)
    assert levels["given"] and all(int(frame) < len(levels["starts"]) for frame in levels["given"])
    assert levels["from_pass_before"] == []
    (loop,) = manifest_of({"id": "a", "task": "loop", "num_frames": 25}).jobs  # which closes the ring of its own clip
    levels = describe_levels(loop, model.backbone.geometry)
    assert levels["given"] and levels["from_pass_before"] == [int(frame) for frame in levels["given"]]
    (long,) = manifest_of({"id": "a", "task": "long_video", "num_frames": 61, "window": 31, "steps": 3}).jobs
    assert describe_levels(long, model.backbone.geometry)["starts"] == [0] * 6 + [3] * 2 + [6] * 2 + [9]


def test_a_model_is_recorded_as_a_manifest_has_it(tmp_path):
    loras = ({"weights": str(tmp_path / "é\udce9"), "strength": 1.5, "expert": "high"},)
    spec = ModelSpec.model_validate({"backbone": "wan2.2-a14b", "weights": "hf:a/b@main", "loras": loras})
    described = describe_model(spec)
    assert ModelSpec.model_validate(json.loads(json.dumps(described))) == spec
    assert described.keys() == {"backbone", "weights", "loras"}


def test_lineage_is_what_the_weights_record_and_stays_small(tmp_path):
    recipe = {"latents": "0" * 16, "levels": "ptss"}
    many = {f"key{i}": i for i in range(1000)}
    deep: object = []
    for _ in range(900):
        deep = [deep]
    for name, record in (("good", {"recipe": recipe, "step": 7}), ("bad", {**many, "a": "x" * 10**6, "deep": deep})):
        save_file({"w": torch.zeros(1)}, tmp_path / f"{name}.safetensors", {"pusa": json.dumps(record)})
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    base, lora, hostile = PartFiles("transformer", (good,), (Adapter(good, 1.4), Adapter(bad))).lineage()
    assert base["record"]["recipe"] == recipe and base["record"]["step"] == 7
    assert lora["strength"] == 1.4 and lora["path"] == str(good)
    assert len(hostile["record"]) == MAX_FACTS + 1 and not {"a", "deep"} & hostile["record"].keys()
    assert len(json.dumps(hostile)) < 20_000 and "'a'" in hostile["record"]["left_out"]


def test_a_job_reads_the_lossless_file_of_another_after_it_is_made(tmp_path):
    first = {"id": "z", "formats": ("lossless",), "num_frames": 13}
    for end in (".lossless.mkv", ".webm"):
        path = Path(f"RUN/videos/z{end}")
        jobs = {"id": "a", "task": "extension", "given": [0, 1], "num_frames": 19, "video": path}, first
        result = generate(manifest_of(*jobs), tmp_path, StubModel)
        assert result.made == (["z", "a"] if end == ".lossless.mkv" else []) and len(result.failed) == (end == ".webm")
    assert len(read_frames(tmp_path / "videos/z.lossless.mkv", range(13))) == 13


def test_what_cannot_be_written_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    videos = tmp_path / "videos"
    (videos / "a.webm").mkdir(parents=True)
    (videos / "b.frames").touch()
    jobs = manifest_of({"id": "a", "formats": ("webm",)}, {"id": "b", "formats": ("png",)}, {"id": "c"})
    problems = check_jobs(jobs, folder=videos)
    assert problems.keys() == {"a", "b"}
    assert "a.webm is a folder, and the job writes a file of this name" in problems["a"]
    assert "b.frames is a file, and the job writes a folder of this name" in problems["b"]
    monkeypatch.setattr(formats, "_encoders", lambda: frozenset({"png"}))
    assert "has no encoder libvpx-vp9 (for webm)" in check_jobs(jobs)["a"] and "b" not in check_jobs(jobs)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("fps: 51, formats: [gif]", "fps is 51 and formats has gif, which shows at most 50 frames a second"),
        ("formats: [mov]", "'webm', 'gif', 'png' or 'lossless'"),
        ("formats: webm", "should be a list"),
    ],
)
def test_formats_that_make_no_sense_are_refused_when_the_manifest_is_read(tmp_path, keys, message):
    text = "kind: generate\nmodel: {weights: 'builtin:tiny'}\njobs:\n  - {task: text_to_video, id: a, %s}\n"
    (path := tmp_path / "a.yaml").write_text(text % keys)
    with pytest.raises(ManifestError, match=message):
        load_manifest(path, tmp_path)
