"""`job:ID` stands for the video that another job of the manifest makes."""

import pytest

from pusa.errors import ManifestError
from pusa.generate.check import check_jobs
from pusa.manifest.loading import load_manifest, read_manifest
from pusa.manifest.models import GenerateManifest
from tests.manifest.conftest import ids

MORE = "task: extension, given: [0], num_frames: 13, width: 32, height: 32"
BALL = "{id: ball, task: text_to_video, num_frames: 13, width: 32, height: 32}"
READERS = {
    "video": f"{MORE}, video: 'job:ball'", "start": f"{MORE}, video: 'job:ball'".replace("extension", "completion"),
    "end": "task: transition, start: 'job:ball', end: 'job:ball', num_frames: 31, width: 32, height: 32",
    "loop": "task: loop, video: 'job:ball', num_frames: 19, width: 32, height: 32",
    "long_video": "task: long_video, video: 'job:ball', given: [0], num_frames: 31, width: 32, height: 32",
}  # fmt: skip


@pytest.mark.parametrize("keys", READERS.values(), ids=READERS)
def test_it_is_the_video_of_the_run_whether_it_is_made_or_not(load, tmp_path, keys):
    load(f"{{id: more, {keys}}}", BALL)
    manifest = load_manifest(tmp_path / "m.yaml", tmp_path / "run")
    job, _ = manifest.jobs
    paths = [getattr(job, key) for key in ("video", "start", "end") if getattr(job, key, None)]
    assert set(paths) == {tmp_path / "run/videos/ball.mp4"}
    assert check_jobs(manifest, folder=tmp_path / "run/videos") == {}
    other = load_manifest(tmp_path / "m.yaml", tmp_path / "other").jobs[0]
    assert "other/videos/ball.mp4" in str(other)
    read_again = GenerateManifest.model_validate_json(manifest.model_dump_json())  # as Prefect does with parameters
    assert read_again == manifest and read_again.resolve_paths(tmp_path) is read_again


def test_ids_of_globs_and_sweeps_can_be_named_and_swept(load):
    grid = "{id: grid, task: text_to_video, sweep: {seed: [1, 2]}}"
    jobs = load(grid, f"{{id: more, {MORE}, sweep: {{video: ['job:grid-seed1', 'job:grid-seed2', a.mp4]}}}}")
    assert ids(jobs)[2:] == ["more-videogrid-seed1", "more-videogrid-seed2", "more-videoa"]
    assert [job.video.name for job in jobs[2:]] == ["grid-seed1.mp4", "grid-seed2.mp4", "a.mp4"]


REFUSED = {
    f"{MORE}, video: 'job:bal'": "jobs.1.video: no job of this manifest has the id bal; did you mean 'ball'?",
    f"{MORE}, video: 'job:Ball'": "jobs.1.video: no job of this manifest has the id Ball; did you mean 'ball'?",
    f"{MORE}, video: 'job:xyz'": "jobs.1.video: no job of this manifest has the id xyz; allowed are 'ball', 'x'",
    f"{MORE}, video: 'job:'": "jobs.1.video: '' is not an id; expected a letter or digit",
    f"{MORE}, video: 'job:../ball'": "jobs.1.video: '../ball' is not an id; expected a letter or digit",
    f"{MORE}, video: 'job:b*'": "jobs.1.video: 'b*' is not an id; expected a letter or digit",
    f"{MORE}, sweep: {{video: ['job:bal']}}": "jobs.1.sweep.video: no job of this manifest has the id bal",
    "task: image_to_video, image: 'job:ball'": "jobs.1.image: 'job:ball' is a video; expected a picture: PNG",
    "task: keyframes, frames: {0: {image: 'job:ball'}}": "jobs.1.frames.0.image: 'job:ball' is a video; expected a",
    "task: loop, image: 'job:ball'": "jobs.1.image: 'job:ball' is a video; expected a picture",
}  # fmt: skip


@pytest.mark.parametrize("keys, message", REFUSED.items())
def test_a_wrong_name_is_refused_in_one_sentence(refused, keys, message):
    (line,) = refused(BALL, f"{{id: x, {keys}}}")
    assert line.startswith(message)


def test_only_what_is_wrong_is_refused(load, tmp_path):
    """A job that cannot be read has an id, and what globs would have made is not known."""
    with pytest.raises(ManifestError) as error:
        load("{id: ball, task: juggle}", f"{{id: more, {MORE}, video: 'job:ball'}}")
    assert len(str(error.value).splitlines()) == 2
    assert [job.id for job in read_manifest(tmp_path / "m.yaml", tmp_path).manifest.jobs] == ["more"]
    with pytest.raises(ManifestError) as error:
        load("{id: a, task: image_to_video, image: 'x*.png'}", f"{{id: more, {MORE}, video: 'job:a-x1'}}")
    assert len(str(error.value).splitlines()) == 2


def test_a_manifest_in_python_names_jobs_too(tmp_path):
    jobs = [{"id": "ball", "task": "text_to_video"}, {"id": "more", "task": "extension", "video": "job:ball"}]
    written = GenerateManifest.model_validate({"model": {"weights": "builtin:tiny"}, "jobs": jobs})
    assert str(written.jobs[1].video) == "job:ball"
    assert written.resolve_paths(tmp_path).jobs[1].video == tmp_path / "videos/ball.mp4"
    wrong = GenerateManifest.model_validate({"model": {"weights": "builtin:tiny"}, "jobs": jobs[1:]})
    with pytest.raises(ValueError, match="no job of this manifest has the id ball"):
        wrong.resolve_paths(tmp_path)


def test_a_job_that_names_itself_or_a_circle_is_refused(load, tmp_path):
    load(
        f"{{id: a, {MORE}, video: 'job:a'}}", f"{{id: b, {MORE}, video: 'job:c'}}", f"{{id: c, {MORE}, video: 'job:b'}}"
    )
    problems = check_jobs(load_manifest(tmp_path / "m.yaml", tmp_path / "run"), folder=tmp_path / "run/videos")
    assert "is its own result" in problems["a"] and all("no order of the jobs" in problems[id] for id in "bc")
