"""Two experts: which one makes which step of a job, what a batch and a continued sampling change, and what is moved."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pusa.backbones import all_families, find_family
from pusa.diffusion.noise_schedules import linear_quadratic, shifted
from pusa.diffusion.sampler import Phase, delayed, split_phases
from pusa.diffusion.windows import Timeline, ring, segments, whole
from pusa.generate.encodings import Encodings
from pusa.generate.plan import plan
from pusa.generate.sampling import Saved, batches, prepare, sample_together
from pusa.generate.stage import generate
from pusa.manifest.models import GenerateManifest, ModelSpec
from pusa.system.files import read_object, sha256_file, write_json
from pusa.weights.model import Model
from tests.helpers.small_wan import write_wan_2_1, write_wan_2_2_a14b

A14B = find_family("wan2.2-a14b")
SIZE = {"width": 32, "height": 32, "num_frames": 9, "steps": 4, "guidance": 2}


def own(steps, frames=3, schedule=shifted.sigmas):
    """Return the schedule's own levels."""
    return schedule(steps)[:, None].expand(-1, frames)


# The rule.


@pytest.mark.parametrize(
    ("steps", "boundary", "high"),
    [
        (4, 0.875, 2),  # as published: t = 1000, 937.5 | 833, 625
        (30, 0.875, 13),  # as published
        (12, 0.875, 6),  # step 5 is at the boundary itself, which is still high
        (14, 0.9, 6),  # so is this step 5, whose level is 0.89999998 in fp32
        (4, 0.0, 4),
        (4, 1.0, 1),
    ],
)
def test_the_published_numbers_of_steps_are_high(steps, boundary, high):
    phases = split_phases(own(steps), whole(3), boundary)
    expected = [Phase(0, range(high)), Phase(1, range(high, steps))]
    assert phases == [phase for phase in expected if phase.steps]


def timelines():
    def of(frames, steps, kind, window, stagger, backwards):
        if kind == "ring":
            return frames, steps, ring(frames, window)
        if kind == "whole":
            return frames, steps, whole(frames)
        least = -(-steps // (window - 3))  # the smallest stagger that the window allows
        stagger = None if kind == "segments" else least + stagger
        return frames, steps, segments(frames, steps, window, 2, stagger, backwards)

    kinds = st.sampled_from(["whole", "ring", "segments", "staircase"])
    numbers = (st.integers(2, 14), st.integers(1, 20), kinds, st.integers(4, 8), st.integers(0, 3), st.booleans())
    return st.builds(of, *numbers)


@given(made=timelines(), boundary=st.floats(0, 1), quadratic=st.booleans())
def test_each_step_belongs_to_one_phase_and_to_the_expert_of_the_frames_it_denoises(made, boundary, quadratic):
    frames, steps, timeline = made
    schedule = linear_quadratic.sigmas if quadratic else shifted.sigmas
    phases = split_phases(own(steps, frames, schedule), timeline, boundary)
    assert [step for phase in phases for step in phase.steps] == list(range(steps + timeline.delay))
    assert all(one.expert != other.expert for one, other in pairwise(phases))
    matrix = delayed(own(steps, frames, schedule), timeline.starts)
    for phase in phases:
        for step in phase.steps:
            seen = {frame for window in timeline.windows(step) for frame in window if frame is not None}
            changing = [frame for frame in seen if matrix[step, frame] != matrix[step + 1, frame]]
            assert changing, "each step denoises a frame that the network sees"
            highest = float(max(matrix[step, frame] for frame in changing))
            assert abs(highest - boundary) < 1e-5 or phase.expert == int(highest < boundary)


def test_frames_that_wait_do_not_keep_the_high_expert_in_use():
    timeline = segments(6, 4, 6, 1, stagger=4)  # one frame after the other, and all six are seen
    assert timeline.windows(0) == [tuple(range(6))] and timeline.starts == (0, 4, 8, 12, 16, 20)
    experts = [phase.expert for phase in split_phases(own(4, 6), timeline, 0.875) for _ in phase.steps]
    assert experts == [0, 0, 1, 1] * 6


def test_a_staircase_has_the_high_expert_until_its_last_frame_is_below_the_boundary():
    timeline = segments(12, 4, 8, 1, stagger=1)
    assert timeline.delay == 11
    assert split_phases(own(4, 12), timeline, 0.875) == [Phase(0, range(13)), Phase(1, range(13, 15))]


@given(made=timelines())
def test_one_transformer_makes_all_steps(made):
    frames, steps, timeline = made
    assert split_phases(own(steps, frames), timeline, None) == [Phase(0, range(steps + timeline.delay))]


def test_the_transformers_of_a_family_are_its_experts_from_high_to_low():
    for family in all_families():
        assert len(family.transformers) in (1, 2)
        assert tuple(family.experts.values()) == (family.transformers if family.experts else ())
        assert bool(family.experts) == (family.boundary is not None) == (len(family.transformers) == 2)
        assert list(family.experts) in ([], ["high", "low"])
        assert all(family.experts[family.expert_of(part)] == part for part in family.experts.values())
        assert family.expert_of("vae") is None


# Jobs.


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return write_wan_2_2_a14b(tmp_path_factory.mktemp("a14b"))


@pytest.fixture
def picture(tmp_path, monkeypatch):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)


class Watched(Model):
    """The small A14B; `calls` are the expert and the highest level of each call of the network."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec, "cpu")
        self.calls: list[tuple[int, float]] = []
        self.moves: list[str] = []
        predict = self.backbone.predict

        def watched(transformer, z_BCFhw, *others):
            parts = self.backbone.family.transformers
            (number,) = [i for i, part in enumerate(parts) if self._loaded.get(part) is transformer]
            self.calls.append((number, round(float(others[0].max()), 4)))
            return predict(transformer, z_BCFhw, *others)

        self.backbone.predict = watched

    def _on_device(self, part):
        if part not in self.moves[-1:]:
            self.moves.append(part)
        return super()._on_device(part)


def manifest_of(weights, *jobs, backbone="wan2.2-a14b", **model) -> GenerateManifest:
    spec = {"backbone": backbone, "weights": str(weights), **model}
    keys = [{"task": "text_to_video", "id": f"a{i}", **SIZE, **job} for i, job in enumerate(jobs)]
    return GenerateManifest.model_validate({"model": spec, "jobs": keys})


def sampled(weights, *jobs, saved=None, on_step=lambda step, x0: None, model=None):
    manifest = manifest_of(weights, *jobs)
    model = model or Watched(manifest.model)
    prepared = [prepare(job, model, Encodings(model, None), Hashes()) for job in manifest.jobs]
    model.calls.clear()
    return sample_together(prepared, model, on_step, saved), model


class Hashes:
    hash_of = staticmethod(sha256_file)


def test_the_schedules_level_chooses_the_expert_also_where_every_frame_is_far_below_it(weights, picture):
    free = sampled(weights, {"prompt": "a ball"})[1].calls
    assert free == [(0, 1.0), (0, 0.9375), (1, 0.8333), (1, 0.625)]
    given = {"task": "keyframes", "frames": {i: {"image": "a.png", "multiplier": 0.2} for i in range(3)}}
    assert sampled(weights, given)[1].calls == [(0, 0.2), (0, 0.1875), (1, 0.1667), (1, 0.125)]


def test_both_experts_count_and_only_for_their_own_steps(weights, tmp_path):
    both = sampled(weights, {})[0][0]
    swapped = tmp_path / "swapped"
    swapped.mkdir()
    for path in weights.iterdir():
        (swapped / path.name).symlink_to(path)
    for name, other in (("transformer", "transformer_2"), ("transformer_2", "transformer")):
        (swapped / name).unlink()
        (swapped / name).symlink_to(weights / other)
    assert not torch.equal(sampled(swapped, {})[0][0], both)
    (swapped / "model_index.json").unlink()
    index = read_object(weights / "model_index.json")
    write_json(swapped / "model_index.json", {**index, "boundary_ratio": 0})  # the first transformer alone
    alone, model = sampled(swapped, {})
    assert {number for number, _ in model.calls} == {0} and not torch.equal(alone[0], both)


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "keys",
    [{}, {"task": "long_video", "num_frames": 29, "window": 17, "overlap": 1, "stagger": 2, "guidance": 1}],
    ids=["a clip", "a staircase"],
)
def test_a_sampling_that_is_killed_after_any_step_continues_with_the_same_expert_and_bits(weights, tmp_path, keys):
    whole_run, model = sampled(weights, keys)
    calls = list(model.calls)
    (change,) = [i for i in range(1, len(calls)) if calls[i][0] != calls[i - 1][0]]
    for steps in sorted({1, change - 1, change, change + 1, len(calls) - 1}):
        saved = Saved(tmp_path / f"{steps}.state.safetensors", "key", 0)
        left = iter(range(1, len(calls)))

        def on_step(step, x0, left=left, steps=steps):
            if next(left) == steps:
                raise Killed

        with pytest.raises(Killed):
            sampled(weights, keys, saved=saved, on_step=on_step, model=model)
        saved = Saved(tmp_path / f"{steps}.state.safetensors", "key", 0)
        made, _ = sampled(weights, keys, saved=saved, model=model)
        assert model.calls == calls[steps:] and torch.equal(made[0], whole_run[0])


def test_jobs_of_different_schedules_share_a_batch_only_without_experts(weights):
    jobs = manifest_of(weights, {}, {"noise_schedule": "shifted(12)"}, {}, {"noise_schedule": "shifted(12)"}).jobs

    def ids(family):
        return [[job.id for job in batch] for batch in batches(jobs, family, 10_000)]

    assert ids(A14B) == [["a0", "a2"], ["a1", "a3"]]
    assert ids(replace(A14B, experts={})) == [["a0", "a1", "a2", "a3"]]
    alone = [sampled(weights, {"seed": seed})[0][0] for seed in (1, 2)]
    together = sampled(weights, {"seed": 1}, {"seed": 2})[0]
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


# The stage.


def test_with_offload_only_the_expert_in_use_is_on_the_device(weights, tmp_path):
    manifest = manifest_of(weights, {"prompt": "a"}, {"prompt": "b"}, offload=True)
    model = Watched(manifest.model)
    assert generate(manifest, tmp_path, lambda spec: model).made == ["a0", "a1"]
    experts = ["transformer", "transformer_2"]
    assert model.moves == ["text_encoder", *experts, "vae"]  # both jobs are one batch
    apart = manifest.model_copy(update={"batch_tokens": 0})
    model = Watched(manifest.model)
    generate(apart, tmp_path / "apart", lambda spec: model)
    chunk = ["text_encoder", *experts, "vae"]
    assert model.moves in (chunk + chunk, ["text_encoder", *experts, *experts, "vae"])


def test_a_staircase_of_few_steps_changes_the_expert_once(weights):
    staircase = {"task": "long_video", "num_frames": 29, "window": 17, "overlap": 1, "stagger": 2, "guidance": 1}
    model = sampled(weights, staircase)[1]
    assert [part for part in model.moves if part != "text_encoder"] == ["transformer", "transformer_2"]


def test_jobs_are_made_again_where_an_expert_or_the_boundary_is_another(weights, tmp_path):
    made = tmp_path / "weights"
    write_wan_2_2_a14b(made)
    manifest = manifest_of(made, {})

    def run():
        return generate(manifest, tmp_path / "run", lambda spec: Model(spec, "cpu"))

    assert run().made == ["a0"] and run().kept == ["a0"]
    index = read_object(made / "model_index.json")
    write_json(made / "model_index.json", {**index, "boundary_ratio": 0.9})
    assert run().made == ["a0"]
    write_json(made / "model_index.json", {**index, "unused": 1})
    assert run().made == ["a0"]  # 0.875 again
    other = write_wan_2_2_a14b(tmp_path / "other", seed=5) / "transformer_2/diffusion_pytorch_model.safetensors"
    other.replace(made / "transformer_2/diffusion_pytorch_model.safetensors")
    assert run().made == ["a0"]
    record = read_object(tmp_path / "run/videos/a0.json")
    assert {"transformer", "transformer_2", "boundary"} <= record["weights"].keys()


def test_a_plan_counts_both_experts_and_one_at_a_time_with_offload(weights, tmp_path):
    one = plan(manifest_of(write_wan_2_1(tmp_path), {}, backbone="wan2.1"), torch.float32)
    two = plan(manifest_of(weights, {}), torch.float32)
    by_part = {part.part: part for part in two.parts}
    assert by_part["transformer_2"].weights == by_part["transformer"].weights == one.parts[1].weights
    assert by_part["transformer_2"].working == by_part["transformer"].working > 0
    assert two.all_on_device == one.all_on_device + by_part["transformer_2"].weights
    assert two.one_at_a_time == one.one_at_a_time
    assert "transformer_2" in two.table(1 << 30, offload=True)


def test_the_timeline_of_a_job_is_what_its_phases_are_made_of(weights):
    (job,) = manifest_of(weights, {"task": "long_video", "num_frames": 29, "window": 17, "overlap": 1}).jobs
    timeline = job.passes(A14B.geometry)[0].timeline
    assert isinstance(timeline, Timeline) and timeline.delay
    experts = [phase.expert for phase in split_phases(own(4, 8), timeline, 0.875)]
    assert experts == [0, 1] * (1 + timeline.delay // 4)  # each segment begins with the high expert
