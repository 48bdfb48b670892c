"""The inputs of jobs: what is read is what the job's key was made of, and jobs may read what other jobs write."""

import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from pusa.generate.check import JobChecks, check_jobs
from pusa.generate.stage import generate
from tests.helpers.stub_model import StubModel, manifest_of

CHANGED = "a.png was changed while it was read; run again"


@pytest.fixture
def picture(tmp_path) -> Path:
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    Image.new("RGB", (32, 32), "#010203").save(tmp_path / "other.png")
    return tmp_path / "a.png"


def replace_by_other(picture: Path) -> None:
    """Put another picture in the place of one, with its size and time."""
    stat = picture.stat()
    other = (picture.parent / "other.png").read_bytes()
    assert len(other) <= stat.st_size + 64
    picture.write_bytes(other)
    os.utime(picture, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def swap_and_put_back(picture: Path) -> None:
    """Give the picture's name to another one for a moment."""
    for old, new in ((picture, "kept.png"), (picture.parent / "other.png", picture), (picture, "other.png")):
        old.rename(picture.parent / new)
    (picture.parent / "kept.png").rename(picture)


def of(picture: Path, id: str = "a", **keys):
    return {"id": id, "task": "image_to_video", "image": picture, **keys}


def change_at(method: str, change) -> type[StubModel]:
    """Return a model that changes something before one of its methods works, for the first time only."""
    changes = [change]

    def changed(self, *args):
        if changes:
            changes.pop()()
        return getattr(StubModel, method)(self, *args)

    return type("Changing", (StubModel,), {method: changed})


@pytest.mark.parametrize("change", [replace_by_other, swap_and_put_back])
def test_a_picture_that_is_replaced_while_it_is_read_fails_the_job_and_leaves_no_latents(tmp_path, picture, change):
    before = picture.read_bytes()
    result = generate(manifest_of(of(picture), {"id": "b"}), tmp_path, change_at("encode", lambda: change(picture)))
    assert result.made == ["b"] and CHANGED in result.failed["a"]
    assert not (tmp_path / "videos/a.mp4").exists() and not (tmp_path / "videos/a.latents.safetensors").exists()
    again = generate(manifest_of(of(picture)), tmp_path, StubModel)
    assert again.made == ["a"]
    picture.write_bytes(before)
    assert generate(manifest_of(of(picture)), tmp_path, StubModel).made == (
        [] if change is swap_and_put_back else ["a"]
    )


def test_what_exact_reads_again_after_decoding_is_what_was_hashed(tmp_path, picture):
    job, change = of(picture, exact=True), lambda: replace_by_other(picture)
    assert CHANGED in generate(manifest_of(job), tmp_path, change_at("decode_chunks", change)).failed["a"]
    assert not (tmp_path / "videos/a.mp4").exists()


@pytest.mark.parametrize(("method", "made_of_the_new_one"), [("encode_text", True), ("decode_chunks", False)])
def test_a_picture_that_is_replaced_beside_its_job_is_not_said_to_be_the_one_of_the_video(
    tmp_path, picture, method, made_of_the_new_one
):
    """The key that was taken at the start of the run is that of the first picture."""
    manifest = manifest_of({"id": "first"}, of(picture))
    changing = change_at(method, lambda: replace_by_other(picture))
    assert generate(manifest, tmp_path / "one", changing).made == ["first", "a"]
    once, again = (tmp_path / run / "videos/a.mp4" for run in ("one", "two"))
    video = once.read_bytes()
    assert ("a" in generate(manifest, tmp_path / "one", StubModel).kept) is made_of_the_new_one
    assert generate(manifest, tmp_path / "two", StubModel).made == ["first", "a"]
    assert (again.read_bytes() == video) is made_of_the_new_one and again.read_bytes() == once.read_bytes()


def test_jobs_that_read_the_results_of_others_are_made_after_them(tmp_path):
    videos = tmp_path / "videos"

    def chain(**keys):
        more = {"task": "extension", "given": [0, 1], "num_frames": 13}
        return manifest_of(
            {"id": "third", **more, "video": videos / "second.mp4"},
            {"id": "second", **more, "video": videos / "first.latents.safetensors"},
            {"id": "first", **keys},
        )

    assert check_jobs(chain(), folder=videos) == {}
    checks = JobChecks(chain(), videos, "dit")
    assert [checks.describe_inputs(job)[0].split(":")[0] for job in chain().jobs[:2]] == [
        "second.mp4 frames 0..6 of 13", "first.latents.safetensors (2 latent frames)"
    ]  # fmt: skip
    assert generate(chain(), tmp_path, StubModel).made == ["first", "second", "third"]
    assert generate(chain(), tmp_path, StubModel).kept == ["third", "second", "first"]
    (videos / "first.latents.safetensors").unlink()
    again = generate(chain(), tmp_path, StubModel)
    assert (again.made, again.kept) == (["first"], ["third", "second"])  # the same latents, so the same inputs
    assert generate(chain(seed=1), tmp_path, StubModel).made == ["first", "second", "third"]


def test_jobs_in_a_circle_and_those_that_need_a_failed_one_are_refused(tmp_path):
    videos = tmp_path / "videos"
    more = {"task": "extension", "given": [0]}
    jobs = [
        {"id": "own", **more, "video": videos / "own.mp4"},
        {"id": "one", **more, "video": videos / "two.mp4"},
        {"id": "two", **more, "video": tmp_path / "link/one.latents.safetensors"},
        {"id": "after", **more, "video": videos / "one.mp4"},
        {"id": "wide", "width": 33},
        {"id": "narrow", **more, "video": videos / "wide.mp4"},
        {"id": "last", **more, "video": videos / "narrow.mp4"},
        {"id": "picture", "task": "image_to_video", "image": videos / "good.mp4"},
        {"id": "short", **more, "given": [0, 1, 2], "num_frames": 19, "video": videos / "good.mp4"},
        {"id": "good"},
    ]
    videos.mkdir()
    (tmp_path / "link").symlink_to(videos)
    problems = check_jobs(manifest_of(*jobs), folder=videos)
    for id, text in {
        "own": "is its own result", "one": "two.mp4 is the result of job two, and no order",
        "two": "one.latents.safetensors is the result of job one, and no order", "after": "is the result of job one",
        "narrow": "its input wide.mp4 is the result of job wide, which cannot be made",
        "last": "its input narrow.mp4 is the result of job narrow", "picture": "is not a picture",
        "short": r"good.mp4 (7 frames to read): latent frame 2 is outside", "wide": "width 33",
    }.items():  # fmt: skip
        assert text in problems[id], id
    result = generate(manifest_of(*jobs), tmp_path, StubModel)
    assert result.made == ["good"] and result.failed == problems


def test_an_older_result_of_a_job_that_fails_is_not_read(tmp_path):
    more = {"id": "more", "task": "extension", "given": [0], "video": tmp_path / "videos/first.mp4"}
    assert generate(manifest_of({"id": "first"}, more), tmp_path, StubModel).made == ["first", "more"]

    class Fails(StubModel):
        def decode_chunks(self, z_CFhw):
            raise RuntimeError("no memory")

    result = generate(manifest_of({"id": "first", "seed": 1}, more), tmp_path, Fails)
    assert result.failed["more"] == "its input first.mp4 is the result of job first, which cannot be made"
    shutil.rmtree(tmp_path / "videos")
    assert generate(manifest_of({"id": "first"}, more), tmp_path, StubModel).made == ["first", "more"]
