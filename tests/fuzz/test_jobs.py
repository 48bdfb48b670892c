"""Random jobs of every task over real inputs: what `check` accepts is made, and all else ends in a sentence."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import event, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import save_file

from pusa.diffusion.noise_schedules import NOISE_SCHEDULES
from pusa.generate.check import JobChecks
from pusa.generate.decode import decode_job
from pusa.generate.latents import save_latents
from pusa.generate.numbers import Measures
from pusa.generate.sampling import sample_job, total_steps
from pusa.generate.stage import generate
from pusa.tasks.base import PRESETS
from pusa.video.media import write_video
from tests.fuzz import examples
from tests.helpers.stub_model import TINY, StubModel, manifest_of

PICTURES = ("small.png", "wide.jpg", "animated.webp")
CLIPS = ("one.mp4", "seven.mp4", "long.mp4", "fast.mp4")
LATENTS = ("six.latents.safetensors", "two.latents.safetensors", "old.latents.safetensors")
BROKEN = (
    "no-space.safetensors", "loop.safetensors", "nan.safetensors", "whole.safetensors", "flipped.safetensors",
    "other.safetensors", "empty.safetensors", "text.png", "none.mp4", "folder",
)  # fmt: skip
JOBS = ("a", "b", "c")


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    """Return a folder with inputs of all kinds, and of all kinds of damage."""
    folder, draw = tmp_path_factory.mktemp("media"), np.random.default_rng(0)
    Image.new("RGB", (32, 32), "red").save(folder / "small.png")
    Image.new("RGB", (60, 20), "blue").save(folder / "wide.jpg")
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "green")]
    frames[0].save(folder / "animated.webp", save_all=True, append_images=frames[1:])
    for name, count, fps in (("one", 1, 24), ("seven", 7, 24), ("long", 40, 24), ("fast", 40, 48)):
        write_video(folder / f"{name}.mp4", draw.integers(0, 256, (count, 32, 48, 3), np.uint8), fps)
    facts = {"key": "0", "latent_space": "dit", "cyclic": "false"}
    latents = torch.ones(12, 6, 4, 4)
    save_latents(folder / "six.latents.safetensors", latents, facts)
    save_latents(folder / "two.latents.safetensors", latents[:, :2], facts)
    save_file({"latents": latents.half()}, folder / "old.latents.safetensors", facts)
    save_latents(folder / "no-space.safetensors", latents, {})
    save_latents(folder / "loop.safetensors", latents, {**facts, "cyclic": "true"})
    save_latents(folder / "nan.safetensors", latents * torch.nan, facts)
    save_latents(folder / "other.safetensors", latents, {**facts, "latent_space": "vae"})
    save_file({"latents": latents.int()}, folder / "whole.safetensors", facts)
    save_file({"else": latents}, folder / "empty.safetensors", facts)
    whole = (folder / "six.latents.safetensors").read_bytes()
    (folder / "flipped.safetensors").write_bytes(whole[:-1] + b"\x01")
    (folder / "text.png").write_text("no picture")
    (folder / "folder").mkdir()
    return folder


def mostly(*common: str, rare: tuple[str, ...] = BROKEN) -> st.SearchStrategy[str]:
    return st.one_of(*[st.sampled_from(common)] * 7, st.sampled_from((*common, *rare)))


INDEX = st.one_of(st.integers(-3, 4), st.integers(-7, 8))
INDICES = st.one_of(st.integers(1, 5).map(lambda count: list(range(count))), st.lists(INDEX, min_size=1, max_size=4))
NUMBER = st.sampled_from([0, 0.2, 1, 1e-9])
MULTIPLIERS = st.one_of(NUMBER, st.lists(NUMBER, min_size=1, max_size=4), st.sampled_from(["0..1", "0.5..0.1", "0..0"]))
PRESET = st.sampled_from(sorted(PRESETS))
PICTURE, CLIP = mostly(*PICTURES), mostly(*CLIPS, *LATENTS)
FRAME = st.one_of(st.just(0), st.integers(-45, 45))
WINDOW = st.sampled_from([7, 13, 19, 31, 20, 100])
SHARED = {
    "width": mostly(32, 32, rare=(16, 48, 33)),
    "height": mostly(32, 32, rare=(16, 48, 1)),
    "num_frames": mostly(7, 13, 19, 31, rare=(1, 8, 61)),
    "fps": mostly(24, rare=(23.976, 12, 47.95, 240, 1)),
    "steps": st.integers(1, 4),
    "guidance": st.sampled_from([1, 2.5]),
    "seed": st.sampled_from([0, 2**63 - 1]),
    "noise_schedule": st.sampled_from(sorted(NOISE_SCHEDULES)),
    "fit": st.sampled_from(["crop", "pad", "stretch"]),
    "exact": st.booleans(),
}
FIRST = st.sampled_from([0, 0, 0, 1, 1, 2, 3])
COUNT = st.integers(1, 4)
SEGMENTS = {"window": WINDOW, "overlap": st.integers(1, 4), "stagger": st.integers(1, 5)}
TASKS = {
    "text_to_video": ({}, {}),
    "image_to_video": ({"image": PICTURE}, {"position": INDEX, "preset": PRESET, "multiplier": NUMBER}),
    "keyframes": (
        {"frames": st.dictionaries(INDEX, st.fixed_dictionaries({"image": PICTURE}), min_size=1, max_size=3)},
        {"preset": PRESET},
    ),
    "transition": (
        {"start": CLIP, "end": CLIP},
        {
            "start_frames": INDICES, "end_frames": st.sampled_from([[-1], [-2, -1], [-3], [-7, -1], [-4, -3, -2, -1]]),
            "start_first_frame": FRAME, "end_first_frame": FRAME, "preset": PRESET, "multipliers": MULTIPLIERS,
            "encoding": st.sampled_from(["each", "joint"]),
        },
    ),
    "extension": (
        {"video": CLIP, "given": st.builds(lambda first, count: [*range(first, first + count)], FIRST, COUNT)},
        {
            "direction": st.sampled_from(["forwards", "backwards"]), "first_frame": FRAME, "preset": PRESET,
            "multipliers": MULTIPLIERS, **SEGMENTS,
        },
    ),
    "completion": ({"video": CLIP, "given": INDICES}, {"first_frame": FRAME, "multipliers": MULTIPLIERS}),
    "completion by made": ({"video": CLIP, "made": INDICES}, {"first_frame": FRAME, "multipliers": MULTIPLIERS}),
    "loop": (
        {},
        {
            "image": PICTURE, "video": CLIP, "first_frame": FRAME, "closing": st.integers(1, 6),
            "multipliers": MULTIPLIERS, "window": WINDOW,
        },
    ),
    "long_video": (
        {},
        {
            "image": PICTURE, "video": CLIP, "given": INDICES, "first_frame": FRAME, "multipliers": MULTIPLIERS,
            **SEGMENTS,
        },
    ),
}  # fmt: skip


@st.composite
def jobs(draw) -> dict:
    task = draw(st.sampled_from(sorted(TASKS)))
    needed, optional = TASKS[task]
    keys = {key: draw(values) for key, values in needed.items()}
    for key in draw(st.lists(st.sampled_from(sorted({**optional, **SHARED})), unique=True, max_size=6)):
        keys[key] = draw({**optional, **SHARED}[key])
    return {"task": task.split(" ")[0], **keys}


def with_paths(value, folder: Path):
    """Return a job with the names of its inputs as paths."""
    if isinstance(value, dict):
        return {key: with_paths(inner, folder) for key, inner in value.items()}
    if isinstance(value, list):
        return [with_paths(inner, folder) for inner in value]
    names = (*PICTURES, *CLIPS, *LATENTS, *BROKEN)
    return folder / value if isinstance(value, str) and value in names else value


class Strict(StubModel):
    def encode(self, frames_THWC):
        geometry = self.backbone.geometry
        assert len(frames_THWC) == geometry.num_frames(geometry.latent_frames(len(frames_THWC)))
        return super().encode(frames_THWC)


@settings(deadline=None, max_examples=examples(80))
@given(jobs())
@example({"task": "extension", "video": "long.mp4", "direction": "backwards", "num_frames": 19})  # longer than itself
@example({"task": "extension", "video": "no-space.safetensors", "given": [0]})
@example({"task": "extension", "video": "other.safetensors", "given": [0]})
@example(
    {"task": "transition", "start": "six.latents.safetensors", "end": "long.mp4", "exact": True, "preset": "exact"}
)
def test_a_job_that_check_accepts_is_made_and_any_other_gets_a_sentence(media, keys):
    try:
        manifest = manifest_of(with_paths({"id": "a", **keys}, media), num_frames=19)
    except ValidationError:
        return
    (job,), model = manifest.jobs, Strict(TINY)
    checks = JobChecks(manifest, None, "dit")
    failures = checks.failures()
    event("refused: " + failures["a"].message.split("; ")[0][-45:] if failures else "accepted " + job.task)
    if failures:
        assert failures["a"].message and not failures["a"].traceback
        return
    assert JobChecks(manifest, None, None, with_inputs=False).failures() == {}
    assert all(checks.describe_inputs(job)) or not job.conditions()
    steps: list[int] = []
    video = decode_job(job, model, sample_job(job, model, lambda step, x0: steps.append(step)))
    assert video.shape == (job.num_frames - job.cyclic, job.height, job.width, 3)
    assert len(steps) == total_steps(job, model.backbone.geometry)
    measures = Measures(job, model.backbone.geometry)
    measures.add(video)
    measures.fault()
    assert all(np.isfinite(seam) for seam in measures.seams().values())


@st.composite
def chains(draw) -> list[dict]:
    """Jobs that read the results of each other, at times of themselves, in any order."""
    results = [f"{id}{end}" for id in JOBS for end in (".mp4", ".latents.safetensors")]
    chain = []
    for id in JOBS:
        job = draw(jobs())
        reads = [key for key in ("video", "start", "end", "image") if key in job]
        chain.append({"id": id, **job, **{key: draw(st.sampled_from([*results, job[key]])) for key in reads}})
    return chain


@settings(deadline=None, max_examples=examples(4))
@given(chains())
def test_what_check_says_of_jobs_that_read_each_others_results_is_what_happens(media, tmp_path_factory, chain):
    run = tmp_path_factory.mktemp("run")
    paths = {f"{id}{end}": run / "videos" / f"{id}{end}" for id in JOBS for end in (".mp4", ".latents.safetensors")}
    placed = [{key: paths.get(value, value) if isinstance(value, str) else value for key, value in job.items()}
              for job in with_paths(chain, media)]  # fmt: skip
    try:
        manifest = manifest_of(*placed, num_frames=19)
    except ValidationError:
        return
    problems = {id: failure.message for id, failure in JobChecks(manifest, run / "videos", "dit").failures().items()}
    event(f"{len(problems)} of {len(JOBS)} refused")
    result = generate(manifest, run, Strict)
    assert result.failed == problems and not result.not_shown
    assert set(result.made) == set(JOBS) - set(problems)
    assert set(generate(manifest, run, Strict).kept) == set(result.made)
