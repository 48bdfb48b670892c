"""Jobs with courses and matrices of levels: in manifests, keys, batches, saved states, records, and from Python."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pusa.api.given import Condition
from pusa.api.models import LoadedModel
from pusa.api.pipeline import PusaPipeline
from pusa.backbones import find_family
from pusa.diffusion.noise_schedules import shifted
from pusa.diffusion.noise_schedules.linear_quadratic import sigmas
from pusa.diffusion.sampler import Phase
from pusa.errors import ConditionError, ManifestError
from pusa.generate.canonical import canonical
from pusa.generate.check import check_jobs
from pusa.generate.encodings import Encodings
from pusa.generate.ledger import InputHashes, Ledger
from pusa.generate.numbers import find_joins
from pusa.generate.outputs import paths_of
from pusa.generate.records import describe_levels
from pusa.generate.sampling import batches, levels_of, prepare, sample_together, total_steps
from pusa.generate.saved import Saved
from pusa.generate.stage import generate
from pusa.generate.sweeps import find_grids
from pusa.manifest.loading import read_manifest
from pusa.manifest.models import GenerateManifest, ModelSpec
from pusa.system.allowed import Allowed
from pusa.system.files import sha256_file
from pusa.weights.model import Model
from tests.helpers.stub_model import TINY, StubBackbone, StubModel, TextFeatures

FAMILY = find_family()
GEOMETRY = FAMILY.geometry
SIZE = {"width": 32, "height": 32, "num_frames": 13, "guidance": 1}  # three latent frames
SIGMAS = sigmas(4).tolist()
RELEASED = [[level * share, level, level] for level, share in zip(SIGMAS, (0.5, 0.2, 0, 0, 0), strict=True)]
PICTURE = {"task": "image_to_video", "image": "a.png"}


class Network(StubBackbone):
    """Predicts what depends on all of its inputs, and keeps the levels and the first latent frames that it saw."""

    def __init__(self):
        self.seen = []

    def predict(self, transformer, z_BCFhw, sigma_BF, text, embedded_guidance=None):
        self.seen.append((sigma_BF, z_BCFhw[:, :, 0].clone()))
        words = text.features.mean((1, 2))[:, None, None, None, None]
        return torch.tanh(0.7 * z_BCFhw - z_BCFhw.mean(2, keepdim=True) + sigma_BF[:, None, :, None, None] + words)


class SmallModel(StubModel):
    def __init__(self):
        super().__init__(TINY)
        self.backbone = Network()

    def encode_text(self, prompts, padded=True):
        return TextFeatures(torch.full((1, 2, 4), len(prompts[0]) % 7 / 7), torch.ones(1, 2, dtype=torch.bool))


class Hashes:
    hash_of = staticmethod(sha256_file)


class Killed(Exception):
    pass


@pytest.fixture(autouse=True)
def picture(tmp_path, monkeypatch) -> Path:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "a.png"


def jobs_of(*jobs, **manifest):
    steps = {} if manifest.pop("plain", False) else {"steps": 4}
    keys = [{"id": f"a{i}", "task": "text_to_video", **SIZE, **steps, **job} for i, job in enumerate(jobs)]
    return GenerateManifest.model_validate({"model": TINY, "jobs": keys, **manifest}).jobs


def sampled(jobs, model=None, **options):
    model = model or SmallModel()
    found = [prepare(job, model, Encodings(model, None), Hashes()) for job in jobs]
    return sample_together(found, model, **options)


def keys_of(job):
    return Ledger(Path("videos"), GEOMETRY, {"transformer": "t"}, InputHashes()).keys_of(job)


# Manifests.


def problems_of(tmp_path, job, more=""):
    path = tmp_path / "m.yaml"
    sizes = "width: 32, height: 32" + ", num_frames: 13" * ("num_frames" not in job)
    path.write_text(f'kind: generate\nmodel: {{weights: "builtin:tiny"}}\n{more}\njobs:\n- {{id: a, {sizes}, {job}}}\n')
    read = read_manifest(path, tmp_path / "run")
    return read.manifest, list(read.problems) + list(check_jobs(read.manifest).values() if read.manifest else ())


ROWS = "[[1, 1, 1], [0.5, 0.9, 1], [0, 0, 0]]"
QUOTES = 'inside [ ] or { } put a course in quotes: "release(a, b)"'  # YAML splits it at the comma
REFUSED = {
    "an unknown course": ("task: text_to_video, levels: stairs", "jobs.0.levels: unknown levels 'stairs'"),
    "a course without quotes": ("task: image_to_video, image: a.png, sweep: {levels: [release(0.4, 0.5)]}", QUOTES),
    "a missing file": ("task: text_to_video, levels: none.npy", "none.npy' is not a file"),
    "a torn file": ("task: text_to_video, levels: torn.npy", "torn.npy' is not a .npy file of real numbers"),
    "another number of steps": (f"task: text_to_video, steps: 3, levels: {ROWS}", "steps is 3, and levels has 3 rows"),
    "a level that rises": ("task: text_to_video, levels: [[0], [1], [0]]", "levels: row 1, frame 0: the level rises"),
    "another number of frames": ("task: text_to_video, levels: [[1, 1], [0, 0]]", "rows of 2 levels; expected 3"),
    "a free frame below 1": ("task: text_to_video, levels: [[1, 1, 0.5], [0, 0, 0]]", "frame 2: the level is 0.5"),
    "a given frame at another level": (
        "task: image_to_video, image: a.png, multiplier: 0.3, levels: [[0.5, 1, 1], [0, 0, 0]]",
        "row 0, frame 0: the level is 0.5; expected 0.3, since its multiplier is 0.3"),
    "a release of nothing": ('task: text_to_video, levels: "release(0.4, 0.5)"', "for given frames, and none is given"),
    "a release of a noisy frame": (
        'task: image_to_video, image: a.png, multiplier: 0.2, levels: "release(0.4, 0.5)"',
        "latent frame 0 has multiplier 0.2; expected 0"),
    "segments": ("task: long_video, num_frames: 61, window: 31, levels: staircase(1)", "expected no segments"),
    "a stagger": ("task: long_video, window: 31, stagger: 64, levels: staircase(1)", "no `stagger`"),
    "a loop": ("task: loop, image: a.png, levels: staircase(1)", "made in parts"),
    "a loop of two passes": ("task: loop, levels: staircase(1)", "made in parts"),
    "too long a staircase": ("task: text_to_video, num_frames: 99997, levels: staircase(10000)", "levels; at most"),
}  # fmt: skip


@pytest.mark.parametrize(("job", "words"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_before_any_work_with_one_sentence(tmp_path, job, words):
    (tmp_path / "torn.npy").write_bytes(b"\x93NUMPY\x01\x00")
    problems = problems_of(tmp_path, job)[1]
    assert words in problems[0] and len(problems) == 1 + (words == QUOTES), problems


def test_a_matrix_has_its_own_steps_and_a_file_is_found_beside_the_manifest_or_in_the_run(tmp_path):
    rows = [[1, 1, 1], [0.5, 0.9, 1], [0, 0, 0]]
    np.save(tmp_path / "l.npy", rows)
    (tmp_path / "run").mkdir()
    np.save(tmp_path / "run/l.npy", np.asarray(rows, np.float32))
    for steps, more in (("", ""), (", steps: 2", ""), ("", "defaults: {steps: 2}")):
        for levels in ("l.npy", ROWS, "RUN/l.npy"):
            manifest, problems = problems_of(tmp_path, f"task: text_to_video{steps}, levels: {levels}", more)
            assert not problems and manifest.jobs[0].steps == 2
            np.testing.assert_allclose(manifest.jobs[0].levels, rows, atol=1e-7)
            assert not paths_of(manifest.jobs[0])  # the levels are in the job
            assert GenerateManifest.model_validate(json.loads(manifest.model_dump_json())).jobs == manifest.jobs
    manifest, problems = problems_of(tmp_path, "task: text_to_video", "defaults: {levels: l.npy}")
    assert not problems and manifest.jobs[0].steps == 2
    assert "steps is 30" in problems_of(tmp_path, f"task: text_to_video, levels: {ROWS}", "defaults: {steps: 30}")[1][0]
    wan = {"id": "a", "task": "text_to_video", "levels": rows}
    spec = {"backbone": "wan2.1", "weights": "builtin:tiny-wan"}
    assert GenerateManifest.model_validate({"model": spec, "jobs": [wan]}).jobs[0].steps == 2


def test_a_file_outside_the_folders_that_a_worker_allows_is_not_read(tmp_path):
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "out.npy", [[1], [0]])
    (tmp_path / "in/link.npy").symlink_to("../out.npy")
    context = {"folder": tmp_path / "in", "run_dir": tmp_path / "in", "allowed": Allowed([str(tmp_path / "in")])}
    for name in ("link.npy", "../out.npy", str(tmp_path / "out.npy")):
        data = {"model": TINY, "jobs": [{"id": "a", "task": "text_to_video", **SIZE, "num_frames": 1, "levels": name}]}
        with pytest.raises((ManifestError, ValueError), match=r"outside|allow"):
            GenerateManifest.model_validate(data, context=context)


def test_courses_can_be_swept_and_their_grid_is_found(tmp_path):
    job = (
        'task: image_to_video, image: a.png, sweep: {levels: ["release(0.4, 0.5)", "release(0.8, 0.5)"], seed: [1, 2]}'
    )
    manifest, problems = problems_of(tmp_path, job)
    assert not problems and len({job.id for job in manifest.jobs}) == 4
    (grid,) = find_grids({job.id: json.loads(job.model_dump_json()) for job in manifest.jobs})
    assert [(axis.key, len(axis.values)) for axis in grid.axes] == [("levels", 2), ("seed", 2)]


# Keys.


@pytest.mark.parametrize("given", [{}, PICTURE, {**PICTURE, "multiplier": 0.3}], ids=["text", "exact", "noisy"])
def test_the_schedule_has_one_key_however_it_is_written(tmp_path, given):
    plain, stairs, named = jobs_of(given, {**given, "levels": "staircase(0)"}, {**given, "levels": "schedule"})
    multipliers = torch.tensor(plain.passes(GEOMETRY)[0].multipliers())
    np.save(tmp_path / "own.npy", levels_of(plain, plain.passes(GEOMETRY)[0], multipliers).numpy())
    (matrix,) = jobs_of({**given, "levels": "own.npy"})
    assert "levels" not in canonical(plain, GEOMETRY)
    for other in (stairs, named, matrix):
        assert canonical(other, GEOMETRY) == canonical(plain, GEOMETRY) and keys_of(other) == keys_of(plain)
        assert torch.equal(sampled([other])[0], sampled([plain])[0])


def test_a_key_counts_the_levels_and_not_how_or_where_they_are_written(tmp_path):
    np.save(tmp_path / "one.npy", RELEASED)
    np.save(tmp_path / "two.npy", RELEASED)
    other = [[level / 2 for level in row[:1]] + row[1:] for row in RELEASED]
    forms = ["one.npy", str(tmp_path / "two.npy"), RELEASED]
    same = [keys_of(job).video for job in jobs_of(*({**PICTURE, "levels": form} for form in forms))]
    same += [keys_of(jobs_of({**PICTURE, "levels": RELEASED, "noise_schedule": "shifted"})[0]).video]
    assert len(set(same)) == 1
    levels = [RELEASED, other, "release(0.4, 0.5)", "release(0.4, 0.6)", "staircase(1)", "staircase(2)", "schedule"]
    keys = {keys_of(job).video for job in jobs_of(*({**PICTURE, "levels": one} for one in levels))}
    assert len(keys) == len(levels)


# Sampling.


def test_a_released_picture_is_noisy_at_first_and_exact_at_the_end(picture):
    (plain, released) = jobs_of(PICTURE, {**PICTURE, "levels": "release(0.5, 0.5)"})
    model, estimates = SmallModel(), []
    (made,) = sampled([released], model, on_step=lambda step, x0: estimates.append(x0[0, :, 0]))
    (usual,) = sampled([plain])
    exact = SmallModel().encode(np.asarray(Image.open(picture).resize((32, 32)))[None])[:, 0]
    assert torch.equal(made[:, 0], exact) and torch.equal(usual[:, 0], exact) and not torch.equal(made, usual)
    levels = torch.cat([sigma for sigma, _ in model.backbone.seen])
    assert levels[:, 0].tolist() == pytest.approx([0.5 * SIGMAS[0], 0.25 * SIGMAS[1], 0, 0])
    assert levels[:, 1].tolist() == pytest.approx(SIGMAS[:-1])
    noises = [(z[0] - (1 - s[0, 0]) * exact) / s[0, 0] for s, z in model.backbone.seen[:2]]
    torch.testing.assert_close(*noises, atol=1e-5, rtol=0)  # the same noise at each level
    assert noises[0].std() > 0.8 and all(torch.equal(one, exact) for one in estimates)


def test_a_matrix_with_the_released_levels_gives_the_released_video():
    run = (job := jobs_of({**PICTURE, "levels": "release(0.5, 0.5)"})[0]).passes(GEOMETRY)[0]
    rows = levels_of(job, run, torch.tensor(run.multipliers())).tolist()
    assert torch.equal(sampled([job])[0], sampled(jobs_of({**PICTURE, "levels": rows}))[0])


def test_a_staircase_delays_each_frame_but_exact_ones():
    (job,) = jobs_of({**PICTURE, "position": 1, "levels": "staircase(2)"})
    model = SmallModel()
    sampled([job], model)
    levels = torch.cat([sigma for sigma, _ in model.backbone.seen])
    assert total_steps(job, GEOMETRY) == len(levels) == 8 and not levels[:, 1].any()
    assert levels[:, 0].tolist() == pytest.approx([*SIGMAS, 0, 0, 0])
    assert levels[:, 2].tolist() == pytest.approx([1, 1, 1, 1, *SIGMAS[:-1]])


def test_a_staircase_has_no_segments_that_could_meet():
    (job,) = jobs_of({"task": "completion", "video": "a.mp4", "given": [1], "levels": "staircase(2)"})
    assert job.passes(GEOMETRY)[0].timeline.starts == (0, 0, 4)
    assert find_joins(job, GEOMETRY) == [0, 6]  # where the given latent frame meets those that are made


CASES = {
    "a release": [{**PICTURE, "levels": "release(0.5, 0.75)", "guidance": 3}],
    "a staircase": [{**PICTURE, "levels": "staircase(1)"}],
    "a batch": [
        {**PICTURE, "levels": "release(0.5, 0.75)", "seed": 1},
        {**PICTURE, "levels": RELEASED, "seed": 2},
        {"seed": 3, "noise_schedule": "shifted"},
        {"seed": 4, "levels": "staircase(1)", "steps": 2},
        {**PICTURE, "multiplier": 0.3, "seed": 5},
    ],
}


@pytest.mark.parametrize("keys", CASES.values(), ids=CASES)
def test_a_run_that_is_killed_after_any_step_continues_with_the_same_bits(tmp_path, keys):
    jobs = jobs_of(*keys)
    assert batches(jobs, FAMILY, 10_000) == [jobs]
    whole, total = sampled(jobs), total_steps(jobs[0], GEOMETRY)
    assert {total_steps(job, GEOMETRY) for job in jobs} == {total}
    for steps in range(1, total + 1):
        path, left = tmp_path / f"{steps}.state.safetensors", iter(range(1, total + 1))

        def on_step(step, x0, left=left, steps=steps):
            if next(left) == steps:
                raise Killed

        with pytest.raises(Killed):
            sampled(jobs, on_step=on_step, saved=Saved(path, "key", 0))
        again = sampled(jobs, saved=Saved(path, "key", 0))
        assert all(torch.equal(made, one) for made, one in zip(again, whole, strict=True))
    for job, made in zip(jobs, whole, strict=True):
        torch.testing.assert_close(made, sampled([job])[0], atol=1e-5, rtol=0)


def test_the_tiny_model_gives_the_same_bits_with_levels_0_as_with_multiplier_0():
    model = Model(ModelSpec(weights="builtin:tiny-pusa"), "cpu")
    rows = [[0, level, level] for level in sigmas(2).tolist()]
    rows[1][2] = 1  # and another course of a free frame, so that it is not the schedule's matrix
    keys = {**PICTURE, "prompt": "a red circle", "steps": 2}
    first = SmallModel().encode  # the stub's encoder takes no time
    model.encode = first
    made, usual = (sampled(jobs_of(job), model)[0] for job in ({**keys, "levels": rows}, keys))
    assert torch.equal(made[:, 0], usual[:, 0]) and not torch.equal(made, usual)


def test_the_frames_that_are_denoised_decide_between_two_experts():
    a14b = find_family("wan2.2-a14b")
    jobs = jobs_of({}, {"levels": "staircase(1)"}, {**PICTURE, "levels": "release(1, 1)"}, {})
    assert [[job.id for job in batch] for batch in batches(jobs, a14b, 10_000)] == [["a0", "a3"], ["a1"], ["a2"]]
    seen = []

    class Experts(SmallModel):
        def phases(self, levels_NF, timeline):
            seen.append(levels_NF.amax(1).tolist())
            return [Phase(0, range(len(levels_NF) - 1))]

    rows = [[0.9, 1, 1], [0.9, 0.6, 1], [0.9, 0.6, 0.6], [0.9, 0.3, 0.4], [0, 0, 0]]
    sampled(jobs_of({**PICTURE, "levels": rows, "noise_schedule": "shifted"}), Experts())
    assert seen == [pytest.approx([1, 1, 0.6, 0.4, 0])]  # the picture at 0.9 is not denoised
    sampled(jobs_of({**PICTURE, "levels": "release(1, 1)", "noise_schedule": "shifted"}), Experts())
    assert seen[1] == pytest.approx(shifted.sigmas(4).tolist())


# What is said about them.


def test_a_record_has_the_matrix_of_a_job_with_levels_and_of_no_other(tmp_path):
    plain, released, stairs, matrix = jobs_of(
        PICTURE, {**PICTURE, "levels": "release(0.5, 0.5)"}, {"levels": "staircase(1)"}, {**PICTURE, "levels": RELEASED}
    )
    assert not {"course", "matrix"} & describe_levels(plain, GEOMETRY).keys()
    described = describe_levels(released, GEOMETRY)
    assert described["course"] == "release(0.5, 0.5)" and described["given"] == {"0": 0.0}
    assert [row[0] for row in described["matrix"]] == pytest.approx([0.5, SIGMAS[1] / 4, 0, 0, 0], abs=1e-6)
    described = describe_levels(stairs, GEOMETRY)
    assert described["starts"] == [0, 1, 2] and len(described["matrix"]) == 7
    described = describe_levels(matrix, GEOMETRY)
    assert described["course"] == "matrix" and "schedule" not in described
    np.testing.assert_allclose(described["matrix"], RELEASED, atol=1e-6)


def test_the_stage_makes_them_once_and_from_python_they_are_the_same(tmp_path, picture):
    size = {"num_frames": 7, "width": 32, "height": 32, "guidance": 1}
    rows = np.asarray([[0.5, 1], [0, 0.5], [0, 0]], np.float32)
    np.save(tmp_path / "l.npy", rows)
    keys = {"id": "a", "task": "image_to_video", "image": str(picture), **size, "levels": "l.npy"}
    manifest = GenerateManifest.model_validate({"model": TINY, "jobs": [keys]})
    assert generate(manifest, tmp_path / "run", StubModel).made == ["a"]
    assert generate(manifest, tmp_path / "run", StubModel).kept == ["a"]
    (tmp_path / "l.npy").unlink()  # the job has its levels
    assert generate(manifest, tmp_path / "run", StubModel).kept == ["a"]
    record = json.loads((tmp_path / "run/videos/a.json").read_text())
    assert record["job"]["levels"] == rows.tolist() and record["job"]["steps"] == 2
    loaded = LoadedModel(StubModel(TINY))
    for levels in (rows, torch.from_numpy(rows), rows.tolist()):
        video = loaded.generate("image_to_video", image=str(picture), levels=levels, **size)
        assert video.sidecar["key"] == record["key"]
    with pytest.raises(ManifestError, match="unknown levels 'stairs'"):
        loaded.generate(levels="stairs")


def test_a_pipeline_takes_levels():
    pipe = PusaPipeline.from_pretrained("builtin:tiny")
    pipe.set_progress_bar_config(disable=True)
    frame = np.full((32, 32, 3), 90, np.uint8)
    keys = {**SIZE, "num_frames": 7, "generator": 5, "output_type": "latent", "guidance_scale": 1}
    del keys["guidance"]

    def call(**more):
        return pipe("a red circle", **{"conditions": Condition(frame), **keys, **more}).frames[0]

    exact = call(num_inference_steps=2)
    released = call(num_inference_steps=2, levels="release(0.5, 1)")
    assert torch.equal(released[:, 0], exact[:, 0]) and not torch.equal(released, exact)
    seen = []
    stairs = {"levels": "staircase(2)", "conditions": None, "num_inference_steps": 2}
    call(callback_on_step_end=lambda pipe, step, t, kept: seen.append(float(t)) or {}, **stairs)
    assert pipe.num_timesteps == 4 and seen[2] == 1000
    rows = torch.tensor([[0.5, 1.0], [0.0, 0.5], [0.0, 0.0]])
    assert torch.equal(call(levels=rows), call(levels=rows.tolist())) and pipe.num_timesteps == 2
    for wrong, words in (("stairs", "levels: unknown"), (rows[:, :1], "rows of 1 levels"), (0.5, "levels: got 0.5")):
        with pytest.raises(ConditionError, match=words):
            call(levels=wrong)
    with pytest.raises(ConditionError, match="steps is 5"):
        call(levels=rows, num_inference_steps=5)
