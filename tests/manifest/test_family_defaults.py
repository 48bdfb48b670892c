"""A manifest gets the defaults of the family that it names, below its own values and those of its jobs."""

import pytest

from pusa.backbones import BACKBONES, find_family
from pusa.errors import ManifestError
from pusa.manifest.loading import load_manifest

JOBS = """
  - {id: text, task: text_to_video, prompt: a}
  - {id: own, task: text_to_video, prompt: a, width: 64, steps: 3}
  - {id: picture, task: image_to_video, image: a.png}
  - {id: more, task: extension, video: a.mp4}
  - {id: set, task: extension, video: a.mp4, multipliers: 0.1}
  - {id: ring, task: loop}
"""


@pytest.fixture(autouse=True)
def second(monkeypatch):
    """The second family under its name."""
    monkeypatch.setitem(BACKBONES, "second", "tests.helpers.second_family:FAMILY")
    return find_family("second")


def load(tmp_path, text):
    (tmp_path / "m.yaml").write_text(text)
    return load_manifest(tmp_path / "m.yaml", tmp_path / "run")


def jobs(tmp_path, backbone, defaults="{}"):
    model = f"{{backbone: {backbone}, weights: 'builtin:tiny'}}"
    manifest = load(tmp_path, f"kind: generate\nmodel: {model}\ndefaults: {defaults}\njobs:{JOBS}")
    return {job.id: job for job in manifest.jobs}


def test_a_job_gets_what_neither_it_nor_the_manifest_sets(tmp_path, second):
    made = jobs(tmp_path, "second", "{height: 128}")
    assert (made["text"].width, made["text"].height, made["text"].num_frames, made["text"].fps) == (832, 128, 81, 16)
    assert (made["text"].steps, made["text"].guidance, made["text"].noise_schedule) == (30, 5, "shifted(8)")
    assert (made["own"].width, made["own"].steps, made["own"].height) == (64, 3, 128)
    assert made["more"].window == 81 and made["ring"].window is None
    assert made["more"].preset == "wan" and made["picture"].preset == "exact"
    assert made["set"].conditions()[0].multipliers == (0.1,) * 4


def test_the_first_family_keeps_its_own(tmp_path):
    made, first = jobs(tmp_path, next(iter(BACKBONES))), find_family()
    assert made["text"].width == first.job.width and made["text"].noise_schedule == first.job.noise_schedule
    assert made["more"].window == first.job.num_frames and made["more"].preset == first.preset


def test_clips_get_the_familys_shape_and_are_checked_by_its_geometry(tmp_path):
    manifest = load(tmp_path, "kind: ingest\nsource: videos\nbackbone: second\nclips: {width: 64}\n")
    assert (manifest.clips.width, manifest.clips.height, manifest.clips.num_frames, manifest.clips.fps) == (
        64,
        496,
        81,
        16,
    )
    with pytest.raises(ManifestError, match="num_frames 31 is not 4k"):
        load(tmp_path, "kind: ingest\nsource: videos\nbackbone: second\nclips: {num_frames: 31}\n")
    shapes = (
        "kind: ingest\nsource: videos\nbackbone: second\nclips: {buckets: [{width: 64, height: 64, num_frames: 9}]}\n"
    )
    assert load(tmp_path, shapes).clips.fps == 16


def test_a_recipe_gets_the_familys_density_targets_and_guidance(tmp_path):
    base = "{backbone: second, weights: a}"
    text = f"kind: finetune\nbase: {base}\ntrain: {{method: lora}}\nvalidation: {{clips: 2}}\n"
    manifest = load(tmp_path, text)
    assert manifest.density == "shifted" and manifest.train.targets == ("q", "v")
    assert manifest.validation.guidance == 5 and manifest.validation.clips == 2
    own = load(tmp_path, text.replace("{method: lora}", "{method: lora, targets: [o]}") + "density: uniform\n")
    assert own.density == "uniform" and own.train.targets == ("o",)


DISTILLED = "{backbone: hunyuan_video, weights: a}"
TEXT_JOB = "jobs: [{id: a, task: text_to_video, prompt: p%s}]\n"


@pytest.mark.parametrize(
    "defaults, own, expected",
    [
        ("{}", "", 6),
        ("{}", ", embedded_guidance: 4", 4),
        ("{embedded_guidance: 5}", "", 5),
        ("{embedded_guidance: 5}", ", embedded_guidance: 4", 4),
        ("{}", ", embedded_guidance: null", 6),
    ],
)
def test_a_job_of_a_distilled_family_is_told_its_guidance(tmp_path, defaults, own, expected):
    text = f"kind: generate\nmodel: {DISTILLED}\ndefaults: {defaults}\n{TEXT_JOB % own}"
    (job,) = load(tmp_path, text).jobs
    assert (job.guidance, job.embedded_guidance) == (1, expected)


def test_a_recipe_of_a_distilled_family_is_told_1_and_its_validation_what_jobs_are(tmp_path):
    text = f"kind: finetune\nbase: {DISTILLED}\nvalidation: {{clips: 2}}\n"
    manifest = load(tmp_path, text)
    assert (manifest.embedded_guidance, manifest.validation.embedded_guidance) == (1, 6)
    manifest = load(tmp_path, text.replace("{clips: 2}", "{embedded_guidance: 3}") + "embedded_guidance: 2\n")
    assert (manifest.embedded_guidance, manifest.validation.embedded_guidance) == (2, 3)


@pytest.mark.parametrize("backbone", ["mochi", "wan2.1", "second"])
@pytest.mark.parametrize(
    "text, place",
    [
        ("kind: generate\nmodel: MODEL\n" + TEXT_JOB % ", embedded_guidance: 6", "jobs: job a: embedded_guidance is 6"),
        ("kind: generate\nmodel: MODEL\ndefaults: {embedded_guidance: 6}\n" + TEXT_JOB % "", "jobs: job a: embedded"),
        ("kind: finetune\nbase: MODEL\nembedded_guidance: 6\n", "embedded_guidance is 6"),
        ("kind: finetune\nbase: MODEL\nvalidation: {embedded_guidance: 6}\n", "validation.embedded_guidance is 6"),
    ],
)
def test_a_family_that_was_not_distilled_is_told_no_guidance(tmp_path, backbone, text, place):
    why = f"would have no effect: backbone {backbone} was not distilled with guidance; remove it"
    with pytest.raises(ManifestError, match=f"{place}.*{why}"):
        load(tmp_path, text.replace("MODEL", f"{{backbone: {backbone}, weights: a}}"))
    null = load(tmp_path, text.replace("MODEL", f"{{backbone: {backbone}, weights: a}}").replace(": 6", ": null"))
    assert null.jobs[0].embedded_guidance is None if null.kind == "generate" else null.embedded_guidance is None


@pytest.mark.parametrize("value", ["0.5", "101", "true", ".nan", ".inf", '"6"', "[6]"])
def test_an_embedded_guidance_is_a_number_from_1_to_100(tmp_path, value):
    for text in (
        f"kind: generate\nmodel: {DISTILLED}\n" + TEXT_JOB % f", embedded_guidance: {value}",
        f"kind: finetune\nbase: {DISTILLED}\nembedded_guidance: {value}\n",
        f"kind: finetune\nbase: {DISTILLED}\nvalidation: {{embedded_guidance: {value}}}\n",
    ):
        with pytest.raises(ManifestError, match="embedded_guidance"):
            load(tmp_path, text)
