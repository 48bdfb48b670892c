"""Prompt files and sweeps that are refused, and how many problems are reported together."""

import math
import os
import time

import pytest

from pusa.manifest.expansion import MAX_JOBS, expand
from pusa.manifest.models import GenerateManifest
from pusa.tasks.base import Job, Settings
from tests.manifest.conftest import FREE_NAMES, PICTURE, fill

# Prompt files.


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "has 0 characters"),
        (b" \n\t\n", "has 0 characters"),
        (b"\xff\xfe", "cannot be read"),
        (b"x" * 10_001, "has 10001 characters; expected 1 to 10000"),
        (b"x" * 50_000, "is too large"),
    ],
)
def test_a_bad_prompt_file_is_named_once(refused, tmp_path, content, message):
    (tmp_path / "p.txt").write_bytes(content)
    (line,) = refused("{id: a, task: text_to_video, prompt_file: p.txt, sweep: {seed: [1, 2]}}")
    assert line.startswith("jobs.0.prompt_file: ") and message in line and "p.txt" in line


@pytest.mark.parametrize("name", ["none.txt", "folder", "pipe", "x" * 300, '"\\0"'])
def test_a_prompt_file_that_is_not_a_file_is_refused(refused, tmp_path, name):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (line,) = refused(f"{{id: a, task: text_to_video, prompt_file: {name}}}")
    assert line.startswith("jobs.0.prompt_file: ") and line.endswith("is not a file")


def test_the_largest_prompt_is_read_whole(load, tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbf" + ("€" * 10_000).encode() + b"\n")
    assert load("{id: a, task: text_to_video, prompt_file: p.txt}")[0].prompt == "€" * 10_000


def test_a_name_with_a_line_break_is_reported_in_one_line(refused, tmp_path):
    fill(tmp_path, "p/two\nlines.txt", text=" ")
    assert len(refused("{id: a, task: text_to_video, prompt_file: 'p/*.txt'}")) == 1


def test_all_bad_prompt_files_are_named(refused, tmp_path):
    fill(tmp_path, "a.txt", "b.txt", text=" ")
    fill(tmp_path, "c.txt")
    lines = refused("{id: a, task: text_to_video, prompt_file: '*.txt'}")
    assert [line.split()[1] for line in lines] == [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]


# One job that is refused, and the line of the error, which begins with its place.

BAD = {
    "prompt twice": ("task: text_to_video, prompt: x, prompt_file: p.txt", "prompt_file: the job also has a `prompt`"),
    "prompt_file no text": ("task: text_to_video, prompt_file: 5", "prompt_file: got 5; expected a path"),
    "prompt swept and from a file": (
        "task: text_to_video, prompt_file: p.txt, sweep: {prompt: [a, b]}",
        "sweep.prompt: the job itself has `prompt_file`; set only one of `prompt_file` and `sweep.prompt`",
    ),
    "set twice": (
        f"{PICTURE}, seed: 1, sweep: {{seed: [1, 2]}}",
        "sweep.seed: the job itself has `seed`; set only one of `seed` and `sweep.seed`",
    ),
    "no mapping": (f"{PICTURE}, sweep: [1, 2]", "sweep: got [1, 2]; expected keys with lists"),
    "null": (f"{PICTURE}, sweep: null", "sweep: got None; expected keys with lists"),
    "empty": (f"{PICTURE}, sweep: {{}}", "sweep: got {}; expected keys with lists"),
    "no list": (f"{PICTURE}, sweep: {{seed: 3}}", "sweep.seed: got 3; expected a list of one or more values"),
    "an empty list": (f"{PICTURE}, sweep: {{seed: []}}", "sweep.seed: got []; expected a list of one or more values"),
    "a required key without values": (
        "task: image_to_video, sweep: {image: []}",
        "sweep.image: got []; expected a list of one or more values",
    ),
    "unknown": (f"{PICTURE}, sweep: {{multipler: [0]}}", "sweep.multipler: unknown key; did you mean 'multiplier'?"),
    "of another task": (
        "task: text_to_video, sweep: {image: [a]}",
        "sweep.image: unknown key; known keys are ",
    ),
    "a number": (f"{PICTURE}, sweep: {{3: [1]}}", "sweep.3: unknown key"),
    "id": (f"{PICTURE}, sweep: {{id: [a, b]}}", "sweep.id: this key cannot be swept"),
    "task": (f"{PICTURE}, sweep: {{task: [a, b]}}", "sweep.task: this key cannot be swept"),
    "sweep": (f"{PICTURE}, sweep: {{sweep: [a, b]}}", "sweep.sweep: this key cannot be swept"),
    "prompt_file": (f"{PICTURE}, sweep: {{prompt_file: [a, b]}}", "sweep.prompt_file: this key cannot be swept"),
    "a value twice": (f"{PICTURE}, sweep: {{seed: [1, 2, 1]}}", "sweep.seed: 1 and 1 make the same part of an id"),
    "a value in two ways": (f"{PICTURE}, sweep: {{seed: [1, 1.0]}}", "sweep.seed: 1 and 1.0 make the same part"),
    "two paths of one stem": (
        "task: image_to_video, sweep: {image: [x/a.png, y/a.png]}",
        "sweep.image: 'x/a.png' and 'y/a.png' make the same part of an id, 'imagea'",
    ),
    "a glob": (
        "task: image_to_video, sweep: {image: ['*.png']}",
        "sweep.image: '*.png' is a glob, which a sweep does not allow",
    ),
    "a glob inside": (
        "task: keyframes, sweep: {frames: [{0: {image: 'a?.png'}}]}",
        "sweep.frames: {0: {'image': 'a?.png'}} is a glob",
    ),
    "a date": (
        f"{PICTURE}, sweep: {{seed: [2020-01-01]}}",
        "sweep.seed: got datetime.date(2020, 1, 1); expected",
    ),
    "a huge number": (
        f"{PICTURE}, sweep: {{seed: [{'9' * 5000}]}}",
        "sweep.seed: Input should be a valid integer (given: '999",
    ),
    "a misspelt sweep": (f"{PICTURE}, swep: {{seed: [1]}}", "swep: unknown key; did you mean 'sweep'?"),
    "a misspelt prompt_file": (
        f"{PICTURE}, promptfile: p.txt",
        "promptfile: unknown key; did you mean 'prompt_file'?",
    ),
}


@pytest.mark.parametrize("job, message", BAD.values(), ids=BAD.keys())
def test_refused_in_one_line(refused, tmp_path, job, message):
    fill(tmp_path, "p.txt")
    good = f"{{id: b, {PICTURE}, sweep: {{seed: [1, 2]}}}}"  # so that indices before and after expansion differ
    (line,) = refused(good, f"{{id: a, {job}}}")
    assert line.startswith(f"jobs.1.{message}")


def test_a_huge_number_is_refused_without_a_sweep_too(refused):
    (line,) = refused(f"{{id: a, {PICTURE}, seed: {'9' * 5000}}}")
    assert line.startswith("jobs.0.seed: Input should be a valid integer (given: '999") and len(line) < 200


# Many problems.


def test_the_first_error_never_hides_the_others(refused, tmp_path):
    fill(tmp_path, "s/a.png", "s/b.png")
    lines = refused(
        "{id: a, task: image_to_video, image: 's/*.png', sweep: {multiplier: [0, 2], sed: [1], steps: []}, widht: 3}",
        "{id: b, task: image_to_video, image: 'none/*.png', prompt_file: none.txt}",
        "{id: ../c, task: image_to_video, image: 's/*.png', sweep: {seed: [1, 2]}}",
        "{id: d, task: image_to_vidoe, sweep: {seed: [1, 2]}}",
        "just a text",
        f"{{id: e, {PICTURE}, position: x, sweep: {{seed: [1, 2, 3]}}}}",
        defaults="{sedd: 1}",
    )
    assert sorted(line.partition(": ")[0] for line in lines) == [
        "defaults.sedd",
        "jobs.0.sweep.multiplier",
        "jobs.0.sweep.sed",
        "jobs.0.sweep.steps",
        "jobs.0.widht",
        "jobs.1.image",
        "jobs.1.prompt_file",
        "jobs.2.id",
        "jobs.3",
        "jobs.4",
        "jobs.5.position",
    ]
    assert any(line.startswith("jobs.0.sweep.multiplier") and "(given: 2)" in line for line in lines)
    assert any("'../c'" in line for line in lines)


def test_a_key_that_is_set_twice_is_checked_at_both_places(refused):
    lines = refused("{id: a, task: text_to_video, seed: x, sweep: {seed: [y]}}")
    assert [line.partition(": ")[0] for line in lines] == ["jobs.0.sweep.seed", "jobs.0.seed"]


def test_a_job_without_an_id_is_reported_once(refused):
    assert refused("{task: text_to_video, sweep: {seed: [1, 2]}}") == ["jobs.0.id: Field required"]


@pytest.mark.parametrize("base", ["../a", "-a", "a b", "5", "i" * 121, "''", "[a]"])
def test_a_bad_id_is_refused_with_and_without_a_sweep(refused, base):
    plain = refused(f"{{id: {base}, {PICTURE}}}")
    assert len(plain) == 1 and plain[0].startswith("jobs.0.id: ")
    assert refused(f"{{id: {base}, {PICTURE}, sweep: {{seed: [1, 2]}}}}") == plain


def test_jobs_that_cannot_be_expanded_do_not_clash_and_are_not_called_too_few(refused):
    job = "{id: a, task: image_to_video, image: 'none/*.png'}"
    lines = refused(job, job)
    assert [line.split(": ")[0] for line in lines] == ["jobs.0.image", "jobs.1.image"]


def test_equal_ids_of_two_jobs_are_refused(refused, load):
    (line,) = refused("{id: a-seed1, task: text_to_video}", "{id: a, task: text_to_video, sweep: {seed: [1, 2]}}")
    assert "several jobs have the id 'a-seed1'" in line
    job = "{id: a, task: text_to_video, sweep: {seed: [%s]}}"
    assert len(load(job % "1, 2", job % "3")) == 3


def test_thousands_of_equal_ids_are_counted(refused):
    (line,) = refused(*(f"{{id: a{i % 500}, task: text_to_video}}" for i in range(1000)))
    assert line.endswith("'a18', 'a19' and 480 more")


@FREE_NAMES
def test_files_that_differ_only_in_case_are_refused(refused, tmp_path):
    fill(tmp_path, "s/b.png", "s/B.png")
    (line,) = refused("{id: a, task: image_to_video, image: 's/*.png'}")
    assert "several jobs have the id 'a-B', 'a-b'" in line


def test_a_negative_key_is_part_of_the_reported_place(refused):
    (line,) = refused("{id: k, task: keyframes, frames: {-1: {image: a.png, multiplier: 3}}}")
    assert line.startswith("jobs.0.frames.-1.multiplier: ")


# The limit of jobs.


def test_too_many_jobs_are_refused_before_they_are_made(refused):
    many = str(list(range(1, 1001)))
    sweep = f"{{seed: {many}, steps: {many}, width: {many}, height: {many}}}"
    start = time.process_time()
    lines = refused(f"{{id: a, task: text_to_video, sweep: {sweep}}}", "{id: b, task: text_to_video, seed: x}")
    assert time.process_time() - start < 5
    assert lines[0] == f"jobs: globs and sweeps make {1000**4 + 1} jobs; allowed are {MAX_JOBS}"
    assert [line.split(": ")[0] for line in lines[1:]] == ["jobs.1.seed"]


def test_the_limit_of_jobs_is_that_of_the_whole_manifest(tmp_path):
    def made(*counts: int):
        jobs = [
            {"id": f"j{i}", "task": "text_to_video", "sweep": {"seed": list(range(n))}} for i, n in enumerate(counts)
        ]
        return expand({"jobs": jobs}, {"folder": tmp_path, "run_dir": tmp_path})

    half = math.ceil(MAX_JOBS / 2)
    assert not made(half, half).problems
    over = made(half, half, 1)
    assert len(over.problems) == 1 and str(MAX_JOBS + 1) in over.problems[0]
    assert len(over.data["jobs"]) == 3
    assert GenerateManifest.model_json_schema()["properties"]["jobs"]["maxItems"] == MAX_JOBS


def test_jobs_that_are_not_a_list_are_left_to_the_model(tmp_path):
    for jobs in (None, 5, {"a": 1}, "text", []):
        assert expand({"jobs": jobs}, {}).data == {"jobs": jobs}
    for job in (None, 5, ["a"], "text", {}, {"task": ["x"]}, {"task": "juggle", "image": "*.png"}):
        assert expand({"jobs": [job]}, {}).data == {"jobs": [job]}


def test_no_task_has_a_key_of_the_expansion_syntax():
    assert not {"prompt_file", "sweep"} & (Job.model_fields.keys() | Settings.model_fields.keys())
