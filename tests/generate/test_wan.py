"""Wan's families end to end: diffusers' own pipelines make the same latents, and every task makes its video."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanPipeline
from PIL import Image

from pusa.backbones import find_family
from pusa.diffusion.noise_schedules import shifted
from pusa.diffusion.seeds import seeded
from pusa.generate.latents import read_latents
from pusa.generate.sampling import sample_job
from pusa.generate.stage import generate
from pusa.manifest.models import GenerateManifest
from pusa.tasks import TASKS
from pusa.weights.model import Model
from tests.helpers.small_wan import write_wan_2_1, write_wan_2_2_5b, write_wan_2_2_a14b

WRITERS = {"wan2.1": write_wan_2_1, "wan2.2-a14b": write_wan_2_2_a14b, "wan2.2-5b": write_wan_2_2_5b}
SIZE = {"width": 64, "height": 32, "num_frames": 9, "guidance": 3}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan")
    return {name: write(folder / name) for name, write in WRITERS.items()}


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return tmp_path / "a.png"


class Scheduler(FlowMatchEulerDiscreteScheduler):
    """diffusers' Euler steps on the levels of the published Pusa, which end at 0 and not at 0.001."""

    def set_timesteps(self, num_inference_steps, device=None, **_):
        super().set_timesteps(sigmas=shifted.sigmas(num_inference_steps)[:-1].tolist(), device=device)


def both(pipeline_class, folder, family, job, **given):
    """Return the latents of one job, and those of diffusers' pipeline for the same noise and settings."""
    spec = {"backbone": family, "weights": str(folder)}
    manifest = GenerateManifest.model_validate({"model": spec, "jobs": [{"id": "a", "seed": 5, **SIZE, **job}]})
    (job,), model = manifest.jobs, Model(manifest.model, "cpu")
    ours = sample_job(job, model)
    pipeline = pipeline_class.from_pretrained(folder, scheduler=Scheduler(), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"width": job.width, "height": job.height, "num_frames": job.num_frames, "guidance_scale": job.guidance}
    noise = torch.randn(ours.shape, generator=seeded(job.seed))[None]
    texts = {"prompt": job.prompt, "negative_prompt": find_family(family).job.negative_prompt}
    made = pipeline(**texts, **settings, **given, num_inference_steps=job.steps, latents=noise, output_type="latent")
    return ours, made.frames[0]


# With 14 steps and shift 5 a level of A14B's schedule is 0.8 and one 0.9; with 12 one is the boundary, 0.875, itself.
@pytest.mark.parametrize(("family", "steps"), [("wan2.1", 4), ("wan2.2-a14b", 12), ("wan2.2-5b", 4)])
def test_text_to_video_with_the_familys_negative_prompt_is_diffusers_own(weights, family, steps):
    job = {"task": "text_to_video", "prompt": "a ball &amp; a  cube", "steps": steps}
    ours, theirs = both(WanPipeline, weights[family], family, job)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert ours.std() > 0.5


def test_5b_with_an_exact_first_frame_is_diffusers_image_to_video(weights, picture):
    job = {"task": "image_to_video", "image": str(picture), "multiplier": 0, "prompt": "a ball", "steps": 4}
    pictures = {"image": Image.open(picture)}
    ours, theirs = both(WanImageToVideoPipeline, weights["wan2.2-5b"], "wan2.2-5b", job, **pictures)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert ours.std() > 0.5


def jobs(picture, drawn):
    """Return one job of each task, and the latent frames that it keeps."""
    clip = str(drawn / "media/ball.mp4")
    picture = str(picture)
    return {
        "text_to_video": ({}, []),
        "image_to_video": ({"image": picture}, [0]),
        "keyframes": (
            {"frames": {0: {"image": picture, "multiplier": 0}, -1: {"image": picture, "multiplier": 0.2}}},
            [0],
        ),
        "transition": ({"start": clip, "end": str(drawn / "media/box.mp4"), "preset": "exact"}, [0, -3, -2, -1]),
        "extension": ({"video": clip, "given": [0, 1], "multipliers": [0, 0.2]}, [0]),
        "completion": ({"video": clip, "given": [0, 2]}, [0, 2]),
        "loop": ({"prompt": "a ball", "num_frames": 29, "window": 17}, []),
        "long_video": ({"image": picture, "num_frames": 33, "window": 17, "overlap": 2, "stagger": 1}, [0]),
    }


def test_both_experts_make_every_task_and_keep_the_frames_that_are_given_exactly(weights, picture, drawn, tmp_path):
    made = jobs(picture, drawn)
    assert made.keys() == TASKS.keys()
    spec = {"backbone": "wan2.2-a14b", "weights": str(weights["wan2.2-a14b"]), "offload": True}
    size = {"width": 32, "height": 32, "num_frames": 17, "steps": 2, "guidance": 1}
    listed = [{"id": task, "task": task, **size, **keys} for task, (keys, _) in made.items()]
    manifest = GenerateManifest.model_validate({"model": spec, "jobs": listed})
    model = Model(manifest.model, "cpu")
    assert set(generate(manifest, tmp_path, lambda spec: model).made) == set(TASKS)
    for job in manifest.jobs:
        z_CFhw = read_latents(tmp_path / f"videos/{job.id}.latents.safetensors")
        other_CFhw = sample_job(job.model_copy(update={"seed": 1}), model)
        kept, frames = made[job.id][1], z_CFhw.shape[1]
        assert frames == model.backbone.geometry.latent_frames(job.num_frames) - job.cyclic
        same = {frame for frame in range(frames) if torch.equal(z_CFhw[:, frame], other_CFhw[:, frame])}
        assert same == {frame % frames for frame in kept}, job.id
