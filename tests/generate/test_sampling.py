"""Sampling continues from a saved state with the same bits, and what shares a batch changes no result."""

import logging
from itertools import permutations

import pytest
import torch
from PIL import Image

from pusa.errors import NotFiniteError
from pusa.generate.encodings import Encodings
from pusa.generate.sampling import (
    batches,
    prepare,
    sample_job,
    sample_together,
    total_steps,
)
from pusa.generate.saved import Saved, read_progress
from pusa.manifest.models import GenerateManifest, ModelSpec
from pusa.system.files import sha256_file
from pusa.weights.model import Model
from tests.helpers.stub_model import TINY, StubBackbone, StubModel, TextFeatures

BASE = {"task": "text_to_video", "width": 32, "height": 32, "num_frames": 13, "steps": 3, "guidance": 1}


class Network(StubBackbone):
    """Predicts what depends on all of its inputs; latent frames depend on each other."""

    most = 100  # samples that fit in memory
    error: Exception = torch.OutOfMemoryError("CUDA out of memory")

    def predict(self, transformer, z_BCFhw, sigma_BF, text, embedded_guidance=None):
        if len(z_BCFhw) > self.most:
            raise self.error
        words = (text.features.mean((1, 2)) - text.pooled.mean(1))[:, None, None, None, None]
        return torch.tanh(0.7 * z_BCFhw - z_BCFhw.mean(2, keepdim=True) + sigma_BF[:, None, :, None, None] + words)


class SmallModel(StubModel):
    """A model whose encoders refuse to work while it samples."""

    sampling = False

    def __init__(self, backbone=Network):
        super().__init__(TINY)
        self.backbone = backbone()

    def encode_text(self, prompts, padded=True):
        assert not self.sampling
        number = float("nan" if prompts[0] == "nan" else len(prompts[0]) % 7)
        features, pooled = torch.full((1, 2, 4), number), torch.full((1, 3), number / 10)
        return TextFeatures(features, torch.ones(1, 2, dtype=torch.bool), pooled)

    def encode(self, frames_THWC):
        assert not self.sampling
        return super().encode(frames_THWC)


class Hashes:
    hash_of = staticmethod(sha256_file)


class Killed(Exception):
    pass


def jobs_of(*jobs):
    keys = [{**BASE, "id": f"a{i}", **job} for i, job in enumerate(jobs)]
    return GenerateManifest.model_validate({"model": TINY, "jobs": keys}).jobs


def prepared(jobs, model):
    found = [prepare(job, model, Encodings(model, None), Hashes()) for job in jobs]
    model.sampling = True
    return found


def kill_after(steps):
    left = [steps]

    def on_step(step, x0):
        left[0] -= 1
        if not left[0]:
            raise Killed

    return on_step


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


LONG = {"task": "long_video", "num_frames": 43, "window": 31, "overlap": 2}
CASES = {
    "a clip": [{"guidance": 4.5, "prompt": "a ball", "seed": 2**40}],
    "segments": [LONG],
    "a staircase": [{**LONG, "stagger": 1, "guidance": 2}],
    "a ring": [{"task": "loop", "image": "a.png", "num_frames": 31}],
    "a clip, then a ring": [{"task": "loop", "num_frames": 31, "window": 19, "guidance": 3, "seed": 5}],
    "a batch": [
        {"guidance": 2.5, "prompt": "a", "seed": 1},
        {"guidance": 7, "task": "image_to_video", "image": "a.png", "seed": 2},
        {"guidance": 4.5, "noise_schedule": "shifted", "negative_prompt": "dark", "seed": 3},
    ],
}


@pytest.fixture
def picture(tmp_path, monkeypatch):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("keys", CASES.values(), ids=CASES.keys())
def test_sampling_that_is_killed_after_any_step_continues_with_the_same_bits(tmp_path, picture, keys):
    jobs = jobs_of(*keys)
    model = SmallModel()
    inputs, total = prepared(jobs, model), total_steps(jobs[0], model.backbone.geometry)
    whole = sample_together(inputs, model)
    assert total >= 3 and all(z.dtype == torch.float32 for z in whole)
    for steps in range(1, total + 1):
        path = tmp_path / f"{steps}.state.safetensors"
        with pytest.raises(Killed):
            sample_together(inputs, model, kill_after(steps), Saved(path, "key", 0, ["x", "y"]))
        assert read_progress(path) == (["x", "y"], steps, total)
        again, later = SmallModel(), []
        saved = Saved(path, "key", 0)
        assert saved.state.done == steps
        made = sample_together(prepared(jobs, again), again, lambda step, x0, later=later: later.append(step), saved)
        assert equal(made, whole) and len(later) == total - steps
        saved.remove()
        assert not path.exists() and read_progress(path) is None


def test_the_tiny_model_continues_with_the_same_bits_from_the_last_state_that_it_was_time_to_save(tmp_path):
    spec, now = ModelSpec(weights="builtin:tiny-pusa"), [0.0]
    (job,) = jobs_of({**LONG, "prompt": "a red ball", "guidance": 2, "steps": 2})
    model, path = Model(spec, "cpu"), tmp_path / "a.state.safetensors"
    inputs, kill = prepare(job, model, Encodings(model, None), Hashes()), kill_after(4)

    def on_step(step, x0):
        now[0] += 10
        kill(step, x0)

    with pytest.raises(Killed):
        sample_together([inputs], model, on_step, Saved(path, "key", 20, clock=lambda: now[0]))
    assert read_progress(path) == ([], 3, 4)  # saved before the third step is reported: 20 seconds had passed
    again = Model(spec, "cpu")
    assert equal(sample_together([inputs], again, saved=Saved(path, "key", 20)), [sample_job(job, model)])


@pytest.mark.parametrize("case", ["torn", "flipped", "of other jobs", "no state", "a folder"])
def test_a_state_that_cannot_be_used_is_ignored(tmp_path, caplog, case):
    model, path = SmallModel(), tmp_path / "a.state.safetensors"
    inputs = prepared(jobs_of({}), model)
    with pytest.raises(Killed):
        sample_together(inputs, model, kill_after(2), Saved(path, "key", 0))
    content = path.read_bytes()
    if case == "torn":
        path.write_bytes(content[:-9])
    elif case == "flipped":
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 4]) + content[-8:])
    elif case == "no state":
        path.write_text("{}")
    elif case == "a folder":
        path.unlink()
        path.mkdir()
    steps = []
    saved = Saved(path, "other" if case == "of other jobs" else "key", 1e9)
    made = sample_together(inputs, model, lambda step, x0: steps.append(step), saved)
    assert steps == [0, 1, 2] and equal(made, sample_together(inputs, model))
    assert "a saved state of sampling is ignored" in caplog.text
    assert (read_progress(path) is None) == (case in ("torn", "no state", "a folder"))


def test_a_state_that_cannot_be_saved_costs_a_warning_and_no_sampling(tmp_path, caplog, monkeypatch):
    model = SmallModel()
    inputs, whole = prepared(jobs_of({}), model), sample_together(prepared(jobs_of({}), SmallModel()), model)

    def refuse(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("pusa.generate.saved.save_verified", refuse)
        full = sample_together(inputs, model, saved=Saved(tmp_path / ".work/a", "key", 0))
    assert equal(full, whole) and [r.levelno for r in caplog.records] == [logging.WARNING]
    assert equal(sample_together(inputs, model, saved=Saved(tmp_path / "moved/.work/a", "key", 0)), whole)
    assert not (tmp_path / "moved").exists() and "does not exist" in caplog.text


@pytest.mark.parametrize("most", [100, 4, 3, 1])
@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
    ids=["gpu", "cpu"],
)
def test_a_batch_that_does_not_fit_is_computed_in_parts(picture, most, error):
    jobs, model = jobs_of(*CASES["a batch"]), SmallModel()
    alone = [sample_together(prepared([job], SmallModel()), model)[0] for job in jobs]
    model.backbone.most, model.backbone.error = most, error
    for a, b in zip(sample_together(prepared(jobs, SmallModel()), model), alone, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_what_does_not_fit_alone_and_any_other_error_is_raised():
    model = SmallModel()
    inputs = prepared(jobs_of({"guidance": 2}), model)
    model.backbone.most = 0
    with pytest.raises(torch.OutOfMemoryError):
        sample_together(inputs, model)
    model.backbone.most, model.backbone.error = 1, RuntimeError("a kernel is missing")
    with pytest.raises(RuntimeError, match="kernel"):
        sample_together(inputs, model)


def test_a_job_that_is_not_finite_fails_alone_also_after_a_kill(tmp_path):
    class Diverges(Network):
        def predict(self, transformer, z_BCFhw, sigma_BF, text, embedded_guidance=None):
            bad_B = (text.features.mean((1, 2)) == 5) & (sigma_BF[:, 0] < 1)  # from the second step on
            v = super().predict(transformer, z_BCFhw, sigma_BF, text)
            return v + torch.where(bad_B, torch.inf, 0.0).view(-1, 1, 1, 1, 1)

    jobs, model = jobs_of({}, {"prompt": "wrong", "seed": 1}, {"seed": 2}), SmallModel(Diverges)
    inputs = prepared(jobs, model)
    first, failed, third = sample_together(inputs, model)
    assert isinstance(failed, NotFiniteError) and "after denoising step 2 of 3: 576 of 576" in str(failed)
    for made, index in ((first, 0), (third, 2)):
        torch.testing.assert_close(made, sample_together([inputs[index]], model)[0], atol=1e-5, rtol=0)
    path = tmp_path / "a"
    with pytest.raises(Killed):
        sample_together(inputs, model, kill_after(2), Saved(path, "key", 0))
    again = sample_together(inputs, model, saved=Saved(path, "key", 0))
    assert equal([again[0], again[2]], [first, third]) and str(again[1]) == str(failed)
    (alone,) = sample_together([inputs[1]], model)
    assert str(alone) == str(failed)
    with pytest.raises(NotFiniteError, match="denoising step 2 of 3"):
        sample_job(jobs[1], SmallModel(Diverges))
    with pytest.raises(NotFiniteError, match="the text features of prompt"):
        prepare(jobs_of({"prompt": "nan"})[0], SmallModel(), Encodings(SmallModel(), None), Hashes())


def test_the_tiny_model_makes_the_same_in_any_batch(picture):
    spec = ModelSpec(weights="builtin:tiny-pusa")
    model, keys = Model(spec, "cpu"), CASES["a batch"]
    jobs = jobs_of(*({**job, "prompt": f"a {i} ball moves left"} for i, job in enumerate(keys)))
    inputs = [prepare(job, model, Encodings(model, None), Hashes()) for job in jobs]
    alone = [sample_job(job, model) for job in jobs]
    for order in list(permutations(range(3)))[::2]:
        for row, made in zip(order, sample_together([inputs[row] for row in order], model), strict=True):
            # Guidance multiplies the last bits, which differ between batches of different sizes.
            torch.testing.assert_close(made, alone[row], atol=1e-5 * float(alone[row].abs().max()), rtol=0)


def test_only_jobs_of_one_kind_that_are_seen_whole_share_a_batch(picture):
    rest = [
        {"guidance": 2}, {"steps": 4}, {"width": 64}, {"num_frames": 7}, {"priority": 1}, {"task": "loop"},
        {**LONG}, {**LONG, "num_frames": 13, "stagger": 1}, {"task": "loop", "num_frames": 13, "image": "a.png"},
    ]  # fmt: skip
    jobs = jobs_of({}, *rest, {"task": "image_to_video", "image": "a.png"}, {**LONG, "num_frames": 13}, {}, {})
    family = SmallModel().backbone.family
    geometry = family.geometry
    tokens = geometry.tokens((1, *geometry.latent_shape(32, 32, 13)))

    def ids(limit, jobs=jobs):
        return [[job.id for job in batch] for batch in batches(jobs, family, limit)]

    alone = [[f"a{i}"] for i in range(1, 10)]
    assert ids(5 * tokens) == [["a0", "a10", "a11", "a12", "a13"], *alone]
    assert ids(2 * tokens) == [["a0", "a10"], *alone, ["a11", "a12"], ["a13"]]
    assert ids(2 * tokens - 1) == ids(0) == [[job.id] for job in jobs]
    guided = jobs_of(*[{"guidance": 2 + i} for i in range(3)])
    assert ids(4 * tokens, guided) == [["a0", "a1"], ["a2"]] and ids(3 * tokens, guided) == [["a0"], ["a1"], ["a2"]]
    told = [job.model_copy(update={"embedded_guidance": n}) for job, n in zip(guided, (6.0, 1.0, 6.0), strict=True)]
    assert ids(6 * tokens, told) == [["a0", "a2"], ["a1"]]
    impossible = jobs_of({"task": "loop", "num_frames": 1}, {}, {})
    assert ids(5 * tokens, impossible) == [["a0"], ["a1", "a2"]]
