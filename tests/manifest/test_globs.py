"""Paths that match many files: which are paired, and how files without a partner are reported."""

import os
from pathlib import Path

import pytest

from pusa.errors import ManifestError
from pusa.manifest.expansion import expand, paths_in
from pusa.manifest.globs import MAX_PARTS, Globs
from pusa.manifest.loading import load_manifest
from pusa.registry import find
from pusa.system.text import MAX_LISTED
from pusa.tasks import TASKS
from tests.manifest.conftest import FREE_NAMES, fill, ids


def test_files_pair_by_stem_and_are_sorted_by_it(load, tmp_path):
    for stem in ("b", "a", "c"):
        fill(tmp_path, f"stills/{stem}.png", f"texts/{stem}.txt", text=f"\n words of {stem} \n")
    jobs = load("{id: g, task: image_to_video, image: 'stills/*.png', prompt_file: 'texts/*.txt'}")
    assert [(job.id, job.image, job.prompt) for job in jobs] == [
        (f"g-{stem}", tmp_path / f"stills/{stem}.png", f"words of {stem}") for stem in "abc"
    ]


def test_the_example_of_the_readme(load, tmp_path):
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


def test_a_glob_is_resolved_as_other_paths_are(load, tmp_path):
    fill(tmp_path, "run/clips/a.mp4", "elsewhere/b.mp4", "deep/1/c.mp4", "deep/1/2/d.mp4", "deep/.hidden.mp4")
    (tmp_path / "deep/folder.mp4").mkdir()

    def found(pattern: str) -> list[Path]:
        return [job.video for job in load(f"{{id: e, task: extension, video: '{pattern}'}}")]

    assert found("RUN/clips/*.mp4") == [tmp_path / "run/clips/a.mp4"]
    assert found(f"{tmp_path}/else*/b.mp4") == [tmp_path / "elsewhere/b.mp4"]
    assert found("deep/**/*.mp4") == [tmp_path / "deep/1/c.mp4", tmp_path / "deep/1/2/d.mp4"]


def test_glob_characters_in_the_manifests_folder_are_literal(tmp_path):
    folder = fill(tmp_path / "[x]*", "a.png")
    (folder / "m.yaml").write_text(
        'kind: generate\nmodel: {weights: "builtin:tiny"}\njobs: [{id: a, task: image_to_video, image: "*.png"}]\n'
    )
    assert load_manifest(folder / "m.yaml", tmp_path).jobs[0].image == folder / "a.png"


def test_a_path_that_names_a_file_exactly_is_not_a_glob(load, tmp_path):
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


def test_files_with_the_same_stem_are_all_named(refused, tmp_path):
    fill(tmp_path, "a.png", "a.jpg", "b.png", "c.png", "sub/b.gif")
    (line,) = refused("{id: g, task: image_to_video, image: '**/[abc].*'}")
    assert line.startswith("jobs.0.image: ")
    assert all(str(tmp_path / name) in line for name in ("a.png", "a.jpg", "b.png", "sub/b.gif"))
    assert "c.png" not in line


@FREE_NAMES
def test_a_name_that_is_not_utf8_is_refused(refused, tmp_path):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")).touch()
    (line,) = refused("{id: g, task: image_to_video, image: '*.png'}")
    assert "not UTF-8" in line and r"\udcff.png" in line


@pytest.fixture
def globs(tmp_path):
    """Return a function that returns the names, relative to a folder, of what its glob matches."""

    def found(pattern: str, **limits: float) -> list[str]:
        paths = Globs({"folder": tmp_path, "run_dir": tmp_path}, **limits).find(pattern).values()
        return sorted(str(path.relative_to(tmp_path)) for path in paths)

    return found


def test_links_to_their_own_folder_are_followed_once(globs, tmp_path):
    fill(tmp_path, "a/b/c.png", "elsewhere/d.png", ".hidden/e.png")
    for link, target in {"a/up": "..", "a/b/self": ".", "a/0": "../elsewhere", "f.png": "f.png", "g": "g"}.items():
        (tmp_path / link).symlink_to(target)
    assert globs("**/*.png") == ["a/b/c.png", "elsewhere/d.png"]  # by the folder's own path, not by a link's
    assert globs("**/**/?.png") == globs("**/**/*/**/**/*.png") == globs("**/*.png")
    assert globs("a/**/*.png") == ["a/0/d.png", "a/b/c.png"]
    assert globs("a/*/d.png") == ["a/0/d.png"]
    assert globs("a/b/self/self/c.*") == ["a/b/self/self/c.png"]


def test_a_search_that_does_not_end_is_given_up_in_one_sentence(globs, refused, tmp_path):
    fill(tmp_path, "x/a.png")
    for link in ("x/1", "x/2"):
        (tmp_path / link).symlink_to(".")
    with pytest.raises(
        ManifestError, match=r"'x/\*.*' was given up in /\S+/x after 5,001 names and .*may look at 5,000 names"
    ):
        globs("x/" + "*/" * 90 + "*.png", max_names=5000)
    with pytest.raises(ManifestError, match=r"was given up .*may look at 1,000,000 names for 0 s"):
        globs("*/*.png", max_seconds=0)
    (line,) = refused("{id: g, task: image_to_video, image: 'x/" + "**/" * MAX_PARTS + "a.png'}")
    assert line.startswith("jobs.0.image: 'x/**/") and line.endswith("a glob has at most 4096 and 100")


def test_the_limits_count_for_all_globs_of_a_manifest_together(tmp_path):
    fill(tmp_path, *(f"{i}.png" for i in range(10)))
    globs = Globs({"folder": tmp_path, "run_dir": tmp_path}, max_names=25)
    for _ in range(9):
        assert len(globs.find("*.png")) == 10  # the same glob is looked for once
    globs.find("*.p*")
    with pytest.raises(ManifestError, match="was given up"):
        globs.find("*")


def test_many_stars_on_a_deep_path_take_no_time(globs, tmp_path):
    deep = "a/" * 40 + "b.png"
    fill(tmp_path, deep)
    assert globs("**/a/" * 18 + "*.png") == [deep]
