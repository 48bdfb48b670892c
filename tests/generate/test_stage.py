"""Generate on the built-in tiny model: jobs in, videos out, and what becomes of those that fail."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pusa.errors import StageError, WeightsError
from pusa.generate.check import check_jobs
from pusa.generate.render import sample_job
from pusa.generate.stage import generate, is_done
from pusa.manifest.models import GenerateManifest, ModelSpec
from pusa.tasks.image_to_video import ImageToVideo
from pusa.video.media import read_frames, write_image, write_video
from pusa.weights.model import Model
from pusa.weights.resolve import require

TINY = ModelSpec(weights="builtin:tiny")
SIZE = {"width": 64, "height": 64, "num_frames": 31}


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(TINY)


def jobs(*found, **settings) -> GenerateManifest:
    defaults = {**SIZE, "steps": 2, "guidance": 1.5, **settings}
    return GenerateManifest.model_validate(
        {
            "model": TINY,
            "jobs": [{"task": "text_to_video", "prompt": "a red circle", **defaults, **job} for job in found],
        }
    )


def test_the_same_seed_gives_the_same_video_and_another_another(tmp_path):
    made = [generate(jobs({"id": "a", "seed": seed}), tmp_path / str(i)) for i, seed in enumerate((1, 1, 2))]
    videos = [(result.videos / "a.mp4").read_bytes() for result in made]
    assert videos[0] == videos[1] != videos[2]


def test_what_is_done_is_kept_and_what_was_damaged_is_made_again(tmp_path):
    manifest = jobs({"id": "a"}, {"id": "b", "seed": 1})
    assert generate(manifest, tmp_path).made == ["a", "b"]
    before = (tmp_path / "videos/a.mp4").read_bytes()
    assert generate(manifest, tmp_path).kept == ["a", "b"]
    (tmp_path / "videos/a.mp4").write_bytes(before[:100])
    again = generate(manifest, tmp_path)
    assert (again.made, again.kept) == (["a"], ["b"]) and (tmp_path / "videos/a.mp4").read_bytes() == before
    assert generate(jobs({"id": "a", "steps": 3}, {"id": "b", "seed": 1}), tmp_path).made == ["a"]


def test_a_video_is_known_by_what_it_was_made_from_not_by_where(drawn, tmp_path):
    for name in ("a.png", "b.png"):
        shutil.copy(drawn / "media/ball-first.png", tmp_path / name)
    job = {"id": "a", "task": "keyframes", "frames": {0: {"image": tmp_path / "a.png"}}}
    assert generate(jobs(job), tmp_path).made == ["a"]
    moved = {**job, "frames": {0: {"image": tmp_path / "b.png"}}}
    assert generate(jobs(moved), tmp_path).kept == ["a"]
    shutil.copy(drawn / "media/box-first.png", tmp_path / "b.png")
    assert generate(jobs(moved), tmp_path).made == ["a"]


def test_latents_outlive_a_failed_decode(tmp_path, monkeypatch):
    def fail(*given):
        raise MemoryError

    monkeypatch.setattr(Model, "decode", fail)
    with pytest.raises(MemoryError):
        generate(jobs({"id": "a"}), tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr("pusa.generate.stage.sample_job", fail)
    assert generate(jobs({"id": "a"}), tmp_path).made == ["a"]


def test_a_video_that_was_not_written_whole_is_no_video(tmp_path):
    import resource

    frames = np.random.default_rng(0).integers(0, 255, (31, 64, 64, 3), np.uint8)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match=r"written completely|ffmpeg"):
            write_video(tmp_path / "a.mp4", frames, 24)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert not list(tmp_path.iterdir())


def test_a_bad_job_is_recorded_and_the_rest_is_made(tmp_path):
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


def test_a_clip_too_short_says_how_long_it_is(drawn, tmp_path):
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


def test_a_pinned_frame_stays_exactly_and_decodes_to_itself(drawn, model, tmp_path):
    frames = read_frames(drawn / "videos/0000.mp4", range(31))
    write_image(tmp_path / "a.png", frames[0])
    job = ImageToVideo(id="a", image=tmp_path / "a.png", steps=3, guidance=1, **SIZE)
    z_CFhw = sample_job(job, model)
    still = model.encode(frames[:1])
    assert torch.equal(z_CFhw[:, :1], still)
    assert np.abs(model.decode(z_CFhw)[0].astype(int) - model.decode(still)[0]).mean() < 3


def test_weights_that_are_not_there_are_named(tmp_path):
    with pytest.raises(WeightsError, match="allowed are builtin:tiny"):
        require(ModelSpec(weights="builtin:huge"))
    with pytest.raises(WeightsError, match="no folder"):
        require(ModelSpec(weights=str(tmp_path / "none")))
    with pytest.raises(WeightsError, match="was the fine-tune run"):
        require(ModelSpec(weights="builtin:tiny", checkpoint=tmp_path / "none"))


def test_is_done_wants_the_very_video(tmp_path):
    assert not is_done(tmp_path, "a", "key")


def test_one_file_may_be_a_clip_to_one_job_and_a_wrong_picture_to_another(drawn, tmp_path):
    clip, picture = drawn / "media/ball.mp4", drawn / "media/ball-first.png"
    wrong = {"id": "wrong", "task": "image_to_video", "image": clip}
    also_wrong = {"id": "also", "task": "extension", "video": picture}
    good = [{"id": f"good{i}", "task": "extension", "video": clip} for i in range(2)]
    still = [{"id": f"still{i}", "task": "image_to_video", "image": picture} for i in range(2)]
    found = generate(jobs(good[0], still[0], wrong, also_wrong, good[1], still[1]), tmp_path)
    assert found.failed.keys() == {"wrong", "also"} and len(found.made) == 4
    assert "is not a picture; expected PNG" in found.failed["wrong"]


def test_where_everything_is_given_nothing_is_made(drawn):
    clip = {"task": "completion", "video": drawn / "media/ball.mp4", "given": list(range(6))}
    found = check_jobs(jobs({"id": "a", **clip}, {"id": "b", "multipliers": 0.2, **clip}))
    assert found == {"a": "all 6 latent frames are given, with multiplier 0; none is made"}
