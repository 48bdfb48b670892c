"""The ids of expanded jobs, sweeps, and the expanded manifest."""

import re

import pytest

from pusa.manifest.expansion import MAX_PART, id_part
from pusa.manifest.loading import load_manifest
from pusa.manifest.models import GenerateManifest
from tests.manifest.conftest import ID, PICTURE, fill, ids

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


def test_a_part_of_an_id_is_short_clean_and_different_for_different_values():
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
def test_a_plain_value_is_in_the_id_as_it_is_written(value, part):
    assert id_part(value) == part


def test_ids_do_not_depend_on_other_files_or_on_the_order_of_values(load, tmp_path):
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


def test_a_swept_key_and_a_prompt_file_override_the_defaults(load, tmp_path):
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


def test_an_expanded_manifest_is_the_same_after_json_and_has_no_syntax_left(load, tmp_path):
    fill(tmp_path, "s/ä b.png", "s/c.png", "s/ä b.txt", "s/c.txt", text="größer")
    load("{id: g, task: image_to_video, image: 's/*.png', prompt_file: 's/*.txt', sweep: {multiplier: [0, 0.5]}}")
    manifest = load_manifest(tmp_path / "m.yaml", tmp_path)
    assert len(manifest.jobs) == 4
    assert GenerateManifest.model_validate_json(manifest.model_dump_json()) == manifest
    assert manifest.resolve_paths(tmp_path / "other", tmp_path / "other") == manifest
