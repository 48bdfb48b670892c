"""Manifests as they are read: paths, defaults, and the problems that are reported."""

from pathlib import Path

import pytest

from pusa.errors import ManifestError
from pusa.manifest.loading import default_run_dir, load_manifest, read_manifest
from pusa.manifest.models import KINDS, PrecomputeManifest

JOB = '{id: a, task: text_to_video, prompt: "x"}'
MODEL = 'model: {backbone: mochi, weights: "builtin:tiny"}'


def write(folder: Path, text: str) -> Path:
    path = folder / "m.yaml"
    path.write_text(text)
    return path


def load(folder: Path, text: str):
    return load_manifest(write(folder, text), folder / "run")


def generate(*jobs: str, more: str = "") -> str:
    return f"kind: generate\n{MODEL}\n{more}\njobs:\n" + "".join(f"  - {job}\n" for job in jobs)


@pytest.mark.parametrize("weights", ["null", "5", "[a]", "{hf: x}"])
def test_weights_that_are_not_a_text_are_refused(tmp_path, weights):
    with pytest.raises(ManifestError, match=r"model\.weights"):
        load(tmp_path, f"kind: generate\nmodel: {{weights: {weights}}}\njobs: [{{id: a, task: text_to_video}}]\n")


def test_paths_are_relative_to_the_manifest_or_to_the_run(tmp_path):
    manifest = load(
        tmp_path,
        "kind: generate\n"
        'model: {weights: "builtin:tiny", checkpoint: RUN/checkpoints/last}\n'
        "jobs:\n  - {id: a, task: image_to_video, image: pictures/a.png}\n",
    )
    assert manifest.model.checkpoint == str(tmp_path / "run/checkpoints/last")
    assert manifest.jobs[0].image == tmp_path / "pictures/a.png"
    assert load(tmp_path, f"kind: precompute\n{MODEL}\nclips: RUN/clips\n").clips == tmp_path / "run/clips"
    by_hand = PrecomputeManifest(clips="RUN/clips", model={"weights": "RUN/x"}).resolve_paths(tmp_path)
    assert (by_hand.clips, by_hand.model.weights) == (tmp_path / "clips", str(tmp_path / "x"))
    assert load(tmp_path, "kind: precompute\nmodel: {weights: big/mochi}\n").model.weights == str(
        tmp_path / "big/mochi"
    )


def test_jobs_take_the_defaults_that_they_do_not_set(tmp_path):
    jobs = load(
        tmp_path, generate(JOB, "{id: b, task: text_to_video, seed: 3}", more="defaults: {seed: 7, steps: 5}")
    ).jobs
    assert [(job.seed, job.steps) for job in jobs] == [(7, 5), (3, 5)]


def test_a_manifest_is_the_same_after_json(tmp_path):
    manifest = load(
        tmp_path, generate(JOB, "{id: k, task: keyframes, frames: {0: {image: a.png}, -1: {image: b.png}}}")
    )
    assert type(manifest).model_validate_json(manifest.model_dump_json()) == manifest


BAD = {
    "an unknown key is met with the nearest known one": (
        generate("{id: a, task: image_to_video, image: a.png, multipler: 0.2}"),
        "multipler: unknown key; did you mean 'multiplier'?",
    ),
    "an unknown key at the top": (generate(JOB, more="modle: 3"), "modle: unknown key; did you mean 'model'?"),
    "an unknown default": (
        generate(JOB, more="defaults: {widht: 3}"),
        "defaults.widht: unknown key; did you mean 'width'",
    ),
    "an unknown task": (
        generate("{id: a, task: juggle}"),
        "unknown task 'juggle'; allowed are text_to_video, image_to_video",
    ),
    "a misspelt task": (generate("{id: a, task: image_to_vidoe}"), "did you mean 'image_to_video'?"),
    "an unknown backbone": (generate(JOB).replace("mochi", "mochy"), "unknown backbone 'mochy'; allowed are mochi"),
    "an unknown noise schedule": (
        generate(JOB, more="defaults: {noise_schedule: cosine}"),
        "unknown noise schedule 'cosine'; allowed are linear_quadratic, shifted",
    ),
    "an id that leaves the folder": (generate("{id: ../a, task: text_to_video}"), "jobs.0.id: "),
    "a duplicate id": (generate(JOB, JOB), "several jobs have the id 'a'"),
    "ids that differ in case only": (
        generate(JOB, "{id: A, task: text_to_video}"),
        "several jobs have the id 'a', 'A'",
    ),
    "a multiplier above 1": (
        generate("{id: a, task: image_to_video, image: a.png, multiplier: 2}"),
        "less than or equal to 1",
    ),
    "no jobs": (f"kind: generate\n{MODEL}\njobs: []\n", "jobs: the list is empty; expected at least one job"),
    "an unknown kind": (
        "kind: generation\n",
        "kind is 'generation'; allowed are ingest, precompute, finetune, generate",
    ),
    "a kind that is no name": ("kind: [ingest]\n", "kind is ['ingest']"),
    "a key given twice": (generate(JOB, more="defaults: {steps: 3, steps: 4}"), "line 3 has the key 'steps' a second"),
    "no kind": ("source: a\n", "kind is None"),
    "no mapping": ("- a\n- b\n", "holds list; expected a mapping"),
    "an empty file": ("", "holds nothing; expected a mapping"),
    "no YAML": ("kind: [", "is not YAML"),
    "an object tag": ("kind: !!python/object/apply:os.system ['true']\n", "is not YAML"),
    "an alias": ("kind: generate\na: &x [1]\nb: *x\n", "line 3 uses a YAML alias"),
    "no task": (
        generate("{id: a}"),
        "jobs.0: has no `task`; expected a mapping with `task`: text_to_video, image_to_video",
    ),
    "a duplicate id beside a mistake": (
        generate(JOB, JOB, "{id: b, task: loopy}"),
        "several jobs have the id 'a'",
    ),
    "a list for a key": ("kind: generate\n? [1, 2]\n: 3\n", "line 2 has a list or a mapping as a key"),
    "a key given twice in other words": (
        generate("{id: k, task: keyframes, frames: {0: {image: a}, 00: {image: b}}}"),
        "line 5 has the key '00' a second time",
    ),
    "a truth for a number": (generate("{id: a, task: text_to_video, seed: yes}"), "seed is true, which is neither"),
    "no multipliers": (
        generate("{id: a, task: completion, video: a, given: [0], multipliers: [0.1, 2]}"),
        "got [0.1, 2]; expected a number in [0, 1], a list of them, or a ramp like 0.1..0.4",
    ),
    "a rate that no video has": (generate(JOB, more="defaults: {fps: 0.0001}"), "greater than or equal to 1"),
    "not a number": (generate(JOB, more="defaults: {guidance: .nan}"), "guidance"),
}


@pytest.mark.parametrize("text, message", BAD.values(), ids=BAD.keys())
def test_a_problem_is_reported_with_its_place(tmp_path, text, message):
    with pytest.raises(ManifestError) as error:
        load(tmp_path, text)
    assert message in str(error.value)
    assert str(tmp_path / "m.yaml") in str(error.value)


def test_the_first_error_never_hides_the_others(tmp_path):
    with pytest.raises(ManifestError) as error:
        load(tmp_path, generate("{id: ../a, task: text_to_video}", "{id: b, task: loopy}", more="defaults: {sedd: 1}"))
    assert len(str(error.value).splitlines()) == 4


def test_a_bad_default_is_reported_once(tmp_path):
    with pytest.raises(ManifestError) as error:
        load(tmp_path, generate(JOB, JOB.replace("id: a", "id: b"), more="defaults: {width: 0}"))
    assert str(error.value).count("greater than or equal to 1") == 1


def test_valid_jobs_are_returned_beside_invalid_ones(tmp_path):
    text = generate(JOB, "{id: b, task: loopy}", "{id: c, task: text_to_video, seed: -1}", JOB)
    found = read_manifest(write(tmp_path, text), tmp_path / "run")
    assert [job.id for job in found.manifest.jobs] == ["a"]
    assert len(found.problems) == 3 and found.problems[-1] == "jobs: several jobs have the id 'a'"
    found = read_manifest(write(tmp_path, generate(JOB, JOB)), tmp_path / "run")
    assert len(found.manifest.jobs) == 1 and found.problems == ["jobs: several jobs have the id 'a'"]


def test_a_yaml_bomb_and_a_huge_file_are_refused(tmp_path):
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    with pytest.raises(ManifestError, match="alias"):
        load(tmp_path, bomb)
    with pytest.raises(ManifestError, match="16777216 bytes"):
        load(tmp_path, "# " + "x" * 17_000_000)
    with pytest.raises(ManifestError, match="nested more than 20 levels deep"):
        load(tmp_path, "a: " + "[" * 100_000)


def test_a_missing_file_and_an_unknown_kind_are_refused(tmp_path):
    with pytest.raises(ManifestError, match="cannot be read"):
        load_manifest(tmp_path / "none.yaml", tmp_path)
    with pytest.raises(ManifestError, match="kind is 'generate'; expected 'ingest'"):
        load_manifest(write(tmp_path, generate(JOB)), tmp_path, "ingest")


def test_every_shipped_manifest_loads(root):
    found = sorted((root / "manifests").rglob("*.yaml"))
    assert {load_manifest(path, root / "runs").kind for path in found} == set(KINDS)


def test_the_run_folder_is_named_after_the_manifests_folder():
    assert default_run_dir(Path("manifests/tiny/ingest.yaml")) == Path("runs/tiny")
    assert default_run_dir(Path("manifests/tiny")) == Path("runs/tiny")


def test_a_manifest_read_from_a_file_is_not_validated_again(tmp_path):
    manifest = load(tmp_path, generate(JOB))
    assert manifest.resolve_paths(tmp_path) is manifest
    keyframes = "{id: a, task: keyframes, frames: {0: {image: a.png}}}"
    read = load(tmp_path, generate(keyframes))
    assert read.resolve_paths(tmp_path) is read
    written = type(read).model_validate({"model": {"weights": "w"}, "jobs": [{"id": "a", "task": "loop"}]})
    assert written.resolve_paths(tmp_path, tmp_path).model.weights == str(tmp_path / "w")
    nested = {"id": "a", "task": "keyframes", "frames": {0: {"image": "a.png"}}}
    written = type(read).model_validate({"model": {"weights": "builtin:tiny"}, "jobs": [nested]})
    assert written.resolve_paths(tmp_path, tmp_path).jobs[0].frames[0].image == tmp_path / "a.png"


def test_a_folder_is_refused_and_the_manifests_in_it_are_named(tmp_path):
    with pytest.raises(ManifestError, match="is a folder; name a manifest in it; it has no"):
        load_manifest(tmp_path, tmp_path)
    path = write(tmp_path, generate(JOB))
    with pytest.raises(ManifestError, match=f"name a manifest in it, such as {path.name}"):
        read_manifest(tmp_path, tmp_path)
