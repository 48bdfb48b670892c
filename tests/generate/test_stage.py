"""Generate with the built-in tiny model: which videos are made, kept or made again, and how failures are recorded."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pusa.errors import StageError, WeightsError
from pusa.generate.check import check_jobs
from pusa.generate.sampling import sample_job
from pusa.generate.stage import generate
from pusa.manifest.models import GenerateManifest, ModelSpec
from pusa.tasks.image_to_video import ImageToVideo
from pusa.video.media import read_frames, write_image
from pusa.weights.model import Model
from pusa.weights.resolve import require_model

TINY = ModelSpec(weights="builtin:tiny")
SIZE = {"width": 64, "height": 64, "num_frames": 31}


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(TINY)


def jobs(*given, **settings) -> GenerateManifest:
    defaults = {**SIZE, "steps": 2, "guidance": 1.5, **settings}
    return GenerateManifest.model_validate(
        {
            "model": TINY,
            "jobs": [{"task": "text_to_video", "prompt": "a red circle", **defaults, **job} for job in given],
        }
    )


def test_equal_seeds_give_equal_videos_and_different_seeds_different_ones(tmp_path):
    made = [generate(jobs({"id": "a", "seed": seed}), tmp_path / str(i)) for i, seed in enumerate((1, 1, 2, 2**32 + 1))]
    videos = [(result.videos / "a.mp4").read_bytes() for result in made]
    assert videos[0] == videos[1] and len(set(videos)) == 3


def test_finished_videos_are_kept_and_damaged_ones_are_made_again(tmp_path):
    manifest = jobs({"id": "a"}, {"id": "b", "seed": 1})
    assert generate(manifest, tmp_path).made == ["a", "b"]
    before = (tmp_path / "videos/a.mp4").read_bytes()
    assert generate(manifest, tmp_path).kept == ["a", "b"]
    (tmp_path / "videos/a.mp4").write_bytes(before[:100])
    again = generate(manifest, tmp_path)
    assert (again.made, again.kept) == (["a"], ["b"]) and (tmp_path / "videos/a.mp4").read_bytes() == before
    assert generate(jobs({"id": "a", "steps": 3}, {"id": "b", "seed": 1}), tmp_path).made == ["a"]


def test_a_video_is_identified_by_the_content_of_its_inputs_not_by_their_paths(drawn, tmp_path):
    for name in ("a.png", "b.png"):
        shutil.copy(drawn / "media/ball-first.png", tmp_path / name)
    job = {"id": "a", "task": "keyframes", "frames": {0: {"image": tmp_path / "a.png"}}}
    assert generate(jobs(job), tmp_path).made == ["a"]
    moved = {**job, "frames": {0: {"image": tmp_path / "b.png"}}}
    assert generate(jobs(moved), tmp_path).kept == ["a"]
    shutil.copy(drawn / "media/box-first.png", tmp_path / "b.png")
    assert generate(jobs(moved), tmp_path).made == ["a"]


def test_latents_are_reused_after_a_failed_decode(tmp_path):
    class FailsToDecode(Model):
        def decode_chunks(self, z_CFhw):
            raise MemoryError

    class FailsToSample(Model):
        @property
        def transformer(self):
            raise AssertionError("the job was sampled again")

    assert generate(jobs({"id": "a"}), tmp_path, FailsToDecode).failed == {"a": "MemoryError: MemoryError"}
    assert generate(jobs({"id": "a"}), tmp_path, FailsToSample).made == ["a"]


def test_a_bad_job_is_recorded_and_the_others_are_made(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    picture = bytearray((Path(__file__).parents[2] / "manifests/tiny-pusa/still.png").read_bytes())
    picture[60:64] = b"\xff" * 4
    (tmp_path / "bad.png").write_bytes(picture)
    bad = {
        "missing": {"task": "image_to_video", "image": tmp_path / "none.png"},
        "damaged": {"task": "image_to_video", "image": tmp_path / "bad.png"},
        "broken": {"task": "image_to_video", "image": tmp_path / "text.png"},
        "long": {"num_frames": 30},
        "wide": {"width": 70},
        "far": {"task": "completion", "video": tmp_path / "none.mp4", "given": [6]},
    }
    manifest = jobs({"id": "good"}, *({"id": id, **job} for id, job in bad.items()))
    result = generate(manifest, tmp_path)
    assert result.made == ["good"] and result.failed.keys() == bad.keys()
    assert "nearest are 25 and 31" in result.failed["long"] and "nearest is 64" in result.failed["wide"]
    assert "given 6 is outside" in result.failed["far"]
    facts = json.loads((tmp_path / "videos/broken.json").read_text())
    assert facts["status"] == "failed" and "text.png is not a picture; expected PNG" in facts["error"]
    assert all(id in result.gallery.read_text() for id in ("good", *bad))
    with pytest.raises(StageError, match="6 jobs failed"):
        result.require_all()


def test_the_error_about_a_short_clip_names_its_length(drawn, tmp_path):
    manifest = jobs(
        {
            "id": "a",
            "task": "completion",
            "video": drawn / "videos/0000.mp4",
            "given": [0, 6],
            "multipliers": 0,
            "num_frames": 61,
        }
    )
    assert "0000.mp4 (31 frames to read): latent frame 6 is outside the 6 latent frames" in check_jobs(manifest)["a"]


def test_a_latent_frame_of_multiplier_0_is_unchanged_and_decodes_to_itself(drawn, model, tmp_path):
    frames = read_frames(drawn / "videos/0000.mp4", range(31))
    write_image(tmp_path / "a.png", frames[0])
    job = ImageToVideo(id="a", image=tmp_path / "a.png", steps=3, guidance=1, **SIZE)
    z_CFhw = sample_job(job, model)
    still = model.encode(frames[:1])
    assert torch.equal(z_CFhw[:, :1], still)
    assert np.abs(model.decode(z_CFhw)[0].astype(int) - model.decode(still)[0]).mean() < 3


def test_errors_about_missing_weights_name_them(tmp_path):
    with pytest.raises(WeightsError, match="expected one of builtin:tiny"):
        require_model(ModelSpec(weights="builtin:huge"))
    with pytest.raises(WeightsError, match="is not a folder"):
        require_model(ModelSpec(weights=str(tmp_path / "none")))
    with pytest.raises(WeightsError, match="was the fine-tune run"):
        require_model(ModelSpec(weights="builtin:tiny", checkpoint=tmp_path / "none"))


def test_one_file_may_be_a_clip_to_one_job_and_a_wrong_picture_to_another(drawn, tmp_path):
    clip, picture = drawn / "media/ball.mp4", drawn / "media/ball-first.png"
    wrong = {"id": "wrong", "task": "image_to_video", "image": clip}
    also_wrong = {"id": "also", "task": "extension", "video": picture}
    good = [{"id": f"good{i}", "task": "extension", "video": clip} for i in range(2)]
    still = [{"id": f"still{i}", "task": "image_to_video", "image": picture} for i in range(2)]
    result = generate(jobs(good[0], still[0], wrong, also_wrong, good[1], still[1]), tmp_path)
    assert result.failed.keys() == {"wrong", "also"} and len(result.made) == 4
    assert "is not a picture; expected PNG" in result.failed["wrong"]


def test_a_job_with_every_latent_frame_given_is_refused(drawn):
    clip = {"task": "completion", "video": drawn / "media/ball.mp4", "given": list(range(6))}
    problems = check_jobs(jobs({"id": "a", **clip}, {"id": "b", "multipliers": 0.2, **clip}))
    assert problems == {"a": "all 6 latent frames are given with multiplier 0; expected one free frame or more"}
