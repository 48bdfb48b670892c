import math
import os
import re
import time
from pathlib import Path

import pytest

from pusa.errors import ManifestError
from pusa.expand import MAX_JOBS, expand
from pusa.globs import paths_in
from pusa.ids import MAX_PART, id_part
from pusa.manifest import GenerateManifest, load_manifest
from pusa.strict import MAX_LISTED
from pusa.tables import find
from pusa.tasks import TASKS
from pusa.tasks.base import Job, Settings

ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}")
FREE_NAMES = pytest.mark.skipif(os.uname().sysname == "Darwin", reason="its file systems change names")
PICTURE = "task: image_to_video, image: a.png"


@pytest.fixture
def load(tmp_path):
    def load(*jobs: str, defaults: str = "{}"):
        text = f'kind: generate\nmodel: {{weights: "builtin:tiny"}}\ndefaults: {defaults}\njobs:\n'
        (tmp_path / "m.yaml").write_text(text + "".join(f"  - {job}\n" for job in jobs), encoding="utf-8")
        return load_manifest(tmp_path / "m.yaml", tmp_path / "run").jobs

    return load


@pytest.fixture
def refused(load):
    """The lines of the refusal, without the manifest's name."""

    def refused(*jobs: str, **more: str) -> list[str]:
        with pytest.raises(ManifestError) as error:
            load(*jobs, **more)
        return [line.removeprefix("  ") for line in str(error.value).splitlines()[1:]]

    return refused


def fill(folder: Path, *names: str, text: str = "some words") -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def ids(jobs) -> list[str]:
    return [job.id for job in jobs]


def test_files_pair_by_stem_and_are_sorted_by_it(load, tmp_path):
    for stem in ("b", "a", "c"):
        fill(tmp_path, f"stills/{stem}.png", f"texts/{stem}.txt", text=f"\n words of {stem} \n")
    jobs = load("{id: g, task: image_to_video, image: 'stills/*.png', prompt_file: 'texts/*.txt'}")
    assert [(job.id, job.image, job.prompt) for job in jobs] == [
        (f"g-{stem}", tmp_path / f"stills/{stem}.png", f"words of {stem}") for stem in "abc"
    ]


def test_the_example(load, tmp_path):
    fill(tmp_path, *(f"stills/{stem}.{ending}" for stem in ("surf", "fox") for ending in ("png", "txt")))
    files = "image: 'stills/*.png', prompt_file: 'stills/*.txt'"
    jobs = load(f"{{id: grid, task: image_to_video, {files}, sweep: {{multiplier: [0, 0.2, 0.4], seed: [1, 2]}}}}")
    assert ids(jobs) == [
        f"grid-{stem}-multiplier{m}-seed{seed}"
        for stem in ("fox", "surf")
        for m in ("0", "0.2", "0.4")
        for seed in (1, 2)
    ]
    assert [(job.multiplier, job.seed) for job in jobs[:3]] == [(0, 1), (0, 2), (0.2, 1)]


def test_a_path_without_a_glob_goes_to_every_pair(load, tmp_path):
    fill(tmp_path, "a/1.mp4", "a/2.mp4", "words.txt", text="the same")
    jobs = load("{id: t, task: transition, start: 'a/?.mp4', end: b.mp4, prompt_file: words.txt}")
    assert [(job.start.name, job.end, job.prompt) for job in jobs] == [
        (name, tmp_path / "b.mp4", "the same") for name in ("1.mp4", "2.mp4")
    ]


def test_globs_of_nested_models_pair_too(load, tmp_path):
    fill(tmp_path, "a/x.png", "a/y.png", "b/x.jpg", "b/y.jpg")
    frames = "{0: {image: 'a/*.png', multiplier: 0.1}, -1: {image: 'b/*.jpg'}, 3: {image: c.png}}"
    jobs = load(f"{{id: k, task: keyframes, frames: {frames}}}")
    assert [[frame.image.name for frame in job.frames.values()] for job in jobs] == [
        ["x.png", "x.jpg", "c.png"],
        ["y.png", "y.jpg", "c.png"],
    ]
    assert all(job.frames[0].multiplier == 0.1 for job in jobs)


PATHS = [
    (name, key)
    for name in TASKS
    for key, field in find(TASKS, name, "task").model_fields.items()
    if field.annotation in (Path, Path | None)
]


@pytest.mark.parametrize("name, key", PATHS)
def test_every_path_of_every_task_takes_a_glob(name, key, tmp_path):
    fill(tmp_path, "in/x.any", "in/y.any")
    made = expand({"jobs": [{"id": "a", "task": name, key: "in/*.any"}]}, {"folder": tmp_path, "run_dir": tmp_path})
    assert [job[key] for job in made.data["jobs"]] == [str(tmp_path / f"in/{stem}.any") for stem in "xy"]
    assert made.origins == [0, 0] and not made.problems


def test_paths_are_found_in_models_mappings_lists_and_unions():
    annotation = dict[str, list[Path | int] | tuple[str, Path]] | Path | None
    assert list(paths_in(annotation, "a")) == [((), "a")]
    assert dict(paths_in(annotation, {"k": ["a", 3]})) == {("k", 0): "a"}
    assert not list(paths_in(dict[str, str] | None, {"k": "*"}))
    assert not list(paths_in(annotation, 5))


def test_a_glob_lies_where_other_paths_do(load, tmp_path):
    fill(tmp_path, "run/clips/a.mp4", "elsewhere/b.mp4", "deep/1/c.mp4", "deep/1/2/d.mp4", "deep/.hidden.mp4")
    (tmp_path / "deep/folder.mp4").mkdir()

    def found(pattern: str) -> list[Path]:
        return [job.video for job in load(f"{{id: e, task: extension, video: '{pattern}'}}")]

    assert found("RUN/clips/*.mp4") == [tmp_path / "run/clips/a.mp4"]
    assert found(f"{tmp_path}/else*/b.mp4") == [tmp_path / "elsewhere/b.mp4"]
    assert found("deep/**/*.mp4") == [tmp_path / "deep/1/c.mp4", tmp_path / "deep/1/2/d.mp4"]


def test_a_manifest_in_a_folder_with_glob_characters(tmp_path):
    folder = fill(tmp_path / "[x]*", "a.png")
    (folder / "m.yaml").write_text(
        'kind: generate\nmodel: {weights: "builtin:tiny"}\njobs: [{id: a, task: image_to_video, image: "*.png"}]\n'
    )
    assert load_manifest(folder / "m.yaml", tmp_path).jobs[0].image == folder / "a.png"


def test_a_file_of_exactly_that_name_is_no_glob(load, tmp_path):
    fill(tmp_path, "a[1].png", "a1.png")
    assert ids(load("{id: a, task: image_to_video, image: 'a[1].png'}")) == ["a"]
    os.remove(tmp_path / "a[1].png")
    assert ids(load("{id: a, task: image_to_video, image: 'a[1].png'}")) == ["a-a1"]


def test_unpaired_files_are_listed_by_key_in_one_line(refused, tmp_path):
    fill(tmp_path, "p/a.png", "p/b.png", "p/c.png", "p/b.txt", "p/d.txt")
    lines = refused("{id: g, task: image_to_video, image: 'p/*.png', prompt_file: 'p/*.txt'}")
    assert len(lines) == 1
    assert lines[0].startswith("jobs.0: ")
    assert "image 'a.png', 'c.png'; prompt_file 'd.txt'" in lines[0]
    assert "b.png" not in lines[0]


def test_a_long_list_of_unpaired_files_is_cut(refused, tmp_path):
    fill(tmp_path, "p/a.txt", *(f"p/{i:03}.png" for i in range(MAX_LISTED + 5)))
    (line,) = refused("{id: g, task: image_to_video, image: 'p/*.png', prompt_file: 'p/*.txt'}")
    assert "'000.png'" in line and f"'{MAX_LISTED:03}.png'" not in line and "and 5 more" in line


def test_no_match_names_the_pattern_and_the_folder(refused, tmp_path):
    (line,) = refused("{id: g, task: image_to_video, image: 'stills/x/*.png'}")
    assert line == f"jobs.0.image: no file matches 'stills/x/*.png' in {tmp_path}/stills/x"


def test_two_files_of_one_stem_are_both_named(refused, tmp_path):
    fill(tmp_path, "a.png", "a.jpg", "b.png", "c.png", "sub/b.gif")
    (line,) = refused("{id: g, task: image_to_video, image: '**/[abc].*'}")
    assert line.startswith("jobs.0.image: ")
    assert all(str(tmp_path / name) in line for name in ("a.png", "a.jpg", "b.png", "sub/b.gif"))
    assert "c.png" not in line


@FREE_NAMES
def test_a_name_that_json_cannot_hold(refused, tmp_path):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")).touch()
    (line,) = refused("{id: g, task: image_to_video, image: '*.png'}")
    assert "not UTF-8" in line and r"\udcff.png" in line


STEMS = [
    "plain",
    "two words",
    "new\nline",
    "größe",
    "日本",
    "x" * 200,
    "-dash",
    "x.. up",
    "a:b",
    "'quote\"",
    "_",
    "a b",
    "a_b",
]


def test_any_stem_makes_an_id(load, tmp_path):
    fill(tmp_path, *(f"s/{stem}.png" for stem in STEMS))
    jobs = load("{id: g, task: image_to_video, image: 's/*.png', sweep: {seed: [1, 2]}}")
    assert all(ID.fullmatch(name) for name in ids(jobs))
    assert len(set(ids(jobs))) == 2 * len(STEMS)
    assert {"g-plain-seed1", "g-a_b-seed1"} <= set(ids(jobs))
    assert sum(re.fullmatch(r"g-a_b\.[0-9a-f]{6}-seed1", name) is not None for name in ids(jobs)) == 2  # a b, a:b


def test_a_part_of_an_id_is_short_clean_and_tells_values_apart():
    values = [
        *STEMS,
        "x" * 201,
        "",
        0,
        -1,
        0.2,
        1e-5,
        1e16,
        10**50,
        True,
        None,
        [0.1, 0.2],
        [[0.1], [0.2]],
        [[0.1, 0.2]],
    ]
    values += [["a_b", "c"], ["a", "b_c"], {0: {"image": "a.png"}}, {0: {"image": "b.png"}}]
    parts = [id_part(value) for value in values]
    assert all(re.fullmatch(rf"[A-Za-z0-9._-]{{0,{MAX_PART}}}", part) for part in parts)
    assert len(set(parts)) == len(values)


@pytest.mark.parametrize(
    "value, part",
    [
        *(
            (0.2, "0.2"),
            (1, "1"),
            (1.0, "1"),
            (1e-5, "1e-05"),
            (1e22, "1e22"),
            (-3, "-3"),
            (True, "true"),
            (False, "false"),
        ),
        *((None, "null"), ("mochi", "mochi"), ([0.1, 0.2], "0.1_0.2"), ("0.1..0.4", "0.1..0.4")),
    ],
)
def test_a_plain_value_reads_as_it_is_written(value, part):
    assert id_part(value) == part


def test_ids_do_not_change_when_a_file_is_added_or_the_order_does(load, tmp_path):
    fill(tmp_path, "s/b.png", "s/c d.png")
    job = "{id: g, task: image_to_video, image: 's/*.png', sweep: {seed: [%s]}}"
    before = ids(load(job % "1, 2"))
    fill(tmp_path, "s/a.png", "s/c_d.png")
    after = ids(load(f"{{id: first, {PICTURE}}}", job % "2, 3, 1"))
    assert len(before) == 4 and set(before) < set(after)


def test_an_id_that_is_too_long_ends_with_a_digest(load):
    long = "i" * 115
    first, second = ids(load(f"{{id: {long}, {PICTURE}, sweep: {{seed: [11111, 11112]}}}}"))
    assert first != second
    assert all(re.fullmatch(r"i{109}\.[0-9a-f]{10}", name) for name in (first, second))


def test_a_job_of_one_video_keeps_its_id(load, tmp_path):
    fill(tmp_path, "p.txt")
    assert ids(load("{id: A.b-c_d, task: text_to_video, prompt_file: p.txt}")) == ["A.b-c_d"]


def test_the_last_swept_key_varies_fastest_and_files_slowest(load, tmp_path):
    fill(tmp_path, "s/a.png", "s/b.png")
    jobs = load("{id: g, task: image_to_video, image: 's/*.png', sweep: {steps: [9, 3], seed: [5, 4]}}")
    assert [(job.image.stem, job.steps, job.seed) for job in jobs] == [
        (stem, steps, seed) for stem in "ab" for steps in (9, 3) for seed in (5, 4)
    ]


def test_lists_mappings_and_paths_can_be_swept(load, tmp_path):
    jobs = load(
        "{id: t, task: transition, start: a, end: b, sweep: {multipliers: [[0, 0.1, 0.2, 0.3], [0.2, 0.3, 0, 1]]}}"
    )
    assert ids(jobs) == ["t-multipliers0_0.1_0.2_0.3", "t-multipliers0.2_0.3_0_1"]
    assert [job.multipliers for job in jobs] == [(0, 0.1, 0.2, 0.3), (0.2, 0.3, 0, 1)]
    jobs = load("{id: i, task: image_to_video, sweep: {image: [x/a.png, y/b.png]}}")
    assert [(job.id, job.image) for job in jobs] == [
        ("i-imagea", tmp_path / "x/a.png"),
        ("i-imageb", tmp_path / "y/b.png"),
    ]
    jobs = load("{id: k, task: keyframes, sweep: {frames: [{0: {image: a.png}}, {-1: {image: a.png}}]}}")
    assert [list(job.frames) for job in jobs] == [[0], [-1]]
    assert len(set(ids(jobs))) == 2


def test_a_swept_key_wins_over_the_defaults_and_a_prompt_file_does(load, tmp_path):
    fill(tmp_path, "p.txt", text="from the file")
    jobs = load(
        "{id: a, task: text_to_video, prompt_file: p.txt, sweep: {seed: [1, 2]}}",
        "{id: b, task: text_to_video}",
        defaults="{seed: 7, prompt: from the defaults, steps: 5}",
    )
    assert [(job.prompt, job.seed, job.steps) for job in jobs] == [
        ("from the file", 1, 5),
        ("from the file", 2, 5),
        ("from the defaults", 7, 5),
    ]


def test_an_expanded_manifest_survives_json_and_knows_nothing_of_the_syntax(load, tmp_path):
    fill(tmp_path, "s/ä b.png", "s/c.png", "s/ä b.txt", "s/c.txt", text="größer")
    load("{id: g, task: image_to_video, image: 's/*.png', prompt_file: 's/*.txt', sweep: {multiplier: [0, 0.5]}}")
    manifest = load_manifest(tmp_path / "m.yaml", tmp_path)
    assert len(manifest.jobs) == 4
    assert GenerateManifest.model_validate_json(manifest.model_dump_json()) == manifest
    assert manifest.located(tmp_path / "other", tmp_path / "other") == manifest


# Prompt files.


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "has 0 characters"),
        (b" \n\t\n", "has 0 characters"),
        (b"\xff\xfe", "cannot be read"),
        (b"x" * 10_001, "has 10001 characters; a prompt file has 1 to 10000"),
        (b"x" * 50_000, "is too large"),
    ],
)
def test_a_bad_prompt_file_is_named_once(refused, tmp_path, content, message):
    (tmp_path / "p.txt").write_bytes(content)
    (line,) = refused("{id: a, task: text_to_video, prompt_file: p.txt, sweep: {seed: [1, 2]}}")
    assert line.startswith("jobs.0.prompt_file: ") and message in line and "p.txt" in line


@pytest.mark.parametrize("name", ["none.txt", "folder", "pipe", "x" * 300, '"\\0"'])
def test_a_prompt_file_that_is_no_file(refused, tmp_path, name):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (line,) = refused(f"{{id: a, task: text_to_video, prompt_file: {name}}}")
    assert line.startswith("jobs.0.prompt_file: ") and line.endswith("is no file")


def test_the_largest_prompt_is_read_whole(load, tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbf" + ("€" * 10_000).encode() + b"\n")
    assert load("{id: a, task: text_to_video, prompt_file: p.txt}")[0].prompt == "€" * 10_000


def test_a_name_of_two_lines_makes_one_line(refused, tmp_path):
    fill(tmp_path, "p/two\nlines.txt", text=" ")
    assert len(refused("{id: a, task: text_to_video, prompt_file: 'p/*.txt'}")) == 1


def test_every_bad_prompt_file_is_named(refused, tmp_path):
    fill(tmp_path, "a.txt", "b.txt", text=" ")
    fill(tmp_path, "c.txt")
    lines = refused("{id: a, task: text_to_video, prompt_file: '*.txt'}")
    assert [line.split()[1] for line in lines] == [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]


# Refusals: one job, and the line that begins with its place.

BAD = {
    "prompt twice": ("task: text_to_video, prompt: x, prompt_file: p.txt", "prompt_file: the job has a `prompt` too"),
    "prompt_file no text": ("task: text_to_video, prompt_file: 5", "prompt_file: 5 is given"),
    "prompt swept and from a file": (
        "task: text_to_video, prompt_file: p.txt, sweep: {prompt: [a, b]}",
        "sweep.prompt: the job itself has `prompt_file`; only one of `prompt_file` and `sweep.prompt` can be given",
    ),
    "set twice": (
        f"{PICTURE}, seed: 1, sweep: {{seed: [1, 2]}}",
        "sweep.seed: the job itself has `seed`; only one of `seed` and `sweep.seed` can be given",
    ),
    "no mapping": (f"{PICTURE}, sweep: [1, 2]", "sweep: [1, 2] is given"),
    "null": (f"{PICTURE}, sweep: null", "sweep: None is given"),
    "empty": (f"{PICTURE}, sweep: {{}}", "sweep: {} is given"),
    "no list": (f"{PICTURE}, sweep: {{seed: 3}}", "sweep.seed: 3 is given; a list of one or more values"),
    "an empty list": (f"{PICTURE}, sweep: {{seed: []}}", "sweep.seed: [] is given; a list of one or more values"),
    "a required key without values": (
        "task: image_to_video, sweep: {image: []}",
        "sweep.image: [] is given; a list of one or more values",
    ),
    "unknown": (f"{PICTURE}, sweep: {{multipler: [0]}}", "sweep.multipler: unknown key; did you mean 'multiplier'?"),
    "of another task": (
        "task: text_to_video, sweep: {image: [a]}",
        "sweep.image: unknown key; known keys are ",
    ),
    "a number": (f"{PICTURE}, sweep: {{3: [1]}}", "sweep.3: unknown key"),
    "id": (f"{PICTURE}, sweep: {{id: [a, b]}}", "sweep.id: it cannot be swept"),
    "task": (f"{PICTURE}, sweep: {{task: [a, b]}}", "sweep.task: it cannot be swept"),
    "sweep": (f"{PICTURE}, sweep: {{sweep: [a, b]}}", "sweep.sweep: it cannot be swept"),
    "prompt_file": (f"{PICTURE}, sweep: {{prompt_file: [a, b]}}", "sweep.prompt_file: it cannot be swept"),
    "a value twice": (f"{PICTURE}, sweep: {{seed: [1, 2, 1]}}", "sweep.seed: 1 and 1 make the same part of an id"),
    "a value in two ways": (f"{PICTURE}, sweep: {{seed: [1, 1.0]}}", "sweep.seed: 1 and 1.0 make the same part"),
    "two paths of one stem": (
        "task: image_to_video, sweep: {image: [x/a.png, y/a.png]}",
        "sweep.image: 'x/a.png' and 'y/a.png' make the same part of an id, 'imagea'",
    ),
    "a glob": ("task: image_to_video, sweep: {image: ['*.png']}", "sweep.image: '*.png' is a glob, and a sweep takes"),
    "a glob inside": (
        "task: keyframes, sweep: {frames: [{0: {image: 'a?.png'}}]}",
        "sweep.frames: {0: {'image': 'a?.png'}} is a glob",
    ),
    "a date": (f"{PICTURE}, sweep: {{seed: [2020-01-01]}}", "sweep.seed: datetime.date(2020, 1, 1) is no text, number"),
    "a huge number": (f"{PICTURE}, sweep: {{seed: [0x{'f' * 5000}]}}", "sweep.seed: a number of thousands of digits"),
    "a misspelt sweep": (f"{PICTURE}, swep: {{seed: [1]}}", "image_to_video.swep: unknown key; did you mean 'sweep'?"),
    "a misspelt prompt_file": (
        f"{PICTURE}, promptfile: p.txt",
        "image_to_video.promptfile: unknown key; did you mean 'prompt_file'?",
    ),
}


@pytest.mark.parametrize("job, message", BAD.values(), ids=BAD.keys())
def test_refused_in_one_line(refused, tmp_path, job, message):
    fill(tmp_path, "p.txt")
    good = f"{{id: b, {PICTURE}, sweep: {{seed: [1, 2]}}}}"  # so that indices before and after expansion differ
    (line,) = refused(good, f"{{id: a, {job}}}")
    assert line.startswith(f"jobs.1.{message}")


def test_a_huge_number_is_refused_where_it_is_no_sweep_too(refused):
    (line,) = refused(f"{{id: a, {PICTURE}, seed: 0x{'f' * 5000}}}")
    assert line.startswith("jobs.0.image_to_video.seed: ") and "thousands of digits" in line


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
        "jobs.0.image_to_video.widht",
        "jobs.0.sweep.multiplier",
        "jobs.0.sweep.sed",
        "jobs.0.sweep.steps",
        "jobs.1.image",
        "jobs.1.prompt_file",
        "jobs.2.image_to_video.id",
        "jobs.3",
        "jobs.4",
        "jobs.5.image_to_video.position",
    ]
    assert any(line.startswith("jobs.0.sweep.multiplier") and "(given: 2)" in line for line in lines)
    assert any("'../c'" in line for line in lines)


def test_a_key_that_is_set_twice_is_checked_where_it_is_set(refused):
    lines = refused("{id: a, task: text_to_video, seed: x, sweep: {seed: [y]}}")
    assert [line.partition(": ")[0] for line in lines] == ["jobs.0.sweep.seed", "jobs.0.text_to_video.seed"]


def test_a_job_without_an_id_is_told_so_once(refused):
    assert refused("{task: text_to_video, sweep: {seed: [1, 2]}}") == ["jobs.0.text_to_video.id: Field required"]


@pytest.mark.parametrize("base", ["../a", "-a", "a b", "5", "i" * 121, "''", "[a]"])
def test_a_bad_id_is_refused_with_and_without_a_sweep(refused, base):
    plain = refused(f"{{id: {base}, {PICTURE}}}")
    assert len(plain) == 1 and plain[0].startswith("jobs.0.image_to_video.id: ")
    assert refused(f"{{id: {base}, {PICTURE}, sweep: {{seed: [1, 2]}}}}") == plain


def test_jobs_that_cannot_be_expanded_do_not_clash_and_are_not_called_too_few(refused):
    job = "{id: a, task: image_to_video, image: 'none/*.png'}"
    lines = refused(job, job)
    assert [line.split(": ")[0] for line in lines] == ["jobs.0.image", "jobs.1.image"]


def test_ids_that_meet_are_refused(refused, load):
    (line,) = refused("{id: a-seed1, task: text_to_video}", "{id: a, task: text_to_video, sweep: {seed: [1, 2]}}")
    assert "several jobs have the id 'a-seed1'" in line
    job = "{id: a, task: text_to_video, sweep: {seed: [%s]}}"
    assert len(load(job % "1, 2", job % "3")) == 3


@FREE_NAMES
def test_files_that_differ_in_case_only_meet_too(refused, tmp_path):
    fill(tmp_path, "s/b.png", "s/B.png")
    (line,) = refused("{id: a, task: image_to_video, image: 's/*.png'}")
    assert "several jobs have the id 'a-B', 'a-b'" in line


def test_negative_keys_show_in_the_place(refused):
    (line,) = refused("{id: k, task: keyframes, frames: {-1: {image: a.png, multiplier: 3}}}")
    assert line.startswith("jobs.0.keyframes.frames.-1.multiplier: ")


# The bound.


def test_too_many_jobs_are_refused_before_they_are_made(refused):
    many = str(list(range(1, 1001)))
    sweep = f"{{seed: {many}, steps: {many}, width: {many}, height: {many}}}"
    start = time.monotonic()
    lines = refused(f"{{id: a, task: text_to_video, sweep: {sweep}}}", "{id: b, task: text_to_video, seed: x}")
    assert time.monotonic() - start < 5
    assert lines[0] == f"jobs: with globs and sweeps there are {1000**4 + 1}; allowed are {MAX_JOBS}"
    assert [line.split(": ")[0] for line in lines[1:]] == ["jobs.1.text_to_video.seed"]


def test_the_bound_is_over_the_whole_manifest_and_that_of_the_model(tmp_path):
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


def test_what_is_no_list_of_jobs_is_left_to_the_model(tmp_path):
    for jobs in (None, 5, {"a": 1}, "text", []):
        assert expand({"jobs": jobs}, {}).data == {"jobs": jobs}
    for job in (None, 5, ["a"], "text", {}, {"task": ["x"]}, {"task": "juggle", "image": "*.png"}):
        assert expand({"jobs": [job]}, {}).data == {"jobs": [job]}


def test_a_job_has_none_of_the_syntax_for_its_own():
    assert not {"prompt_file", "sweep"} & (Job.model_fields.keys() | Settings.model_fields.keys())
