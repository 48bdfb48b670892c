"""The shipped tiny models: layout, size, and quality as measured."""

import numpy as np
import pytest
import torch

from pusa.backbones import DEFAULT_BACKBONE
from pusa.backbones.tiny_recipe import find_tiny_recipe
from pusa.evaluate.pixels import recognize
from pusa.evaluate.unseen import job_settings, unseen_scenes
from pusa.generate.sampling import sample_job
from pusa.manifest.models import ModelSpec
from pusa.tasks.text_to_video import TextToVideo
from pusa.tiny.shapes import draw
from pusa.tiny.training import reconstruction_psnr, to_pixels, train_vae
from pusa.weights.model import Model
from pusa.weights.resolve import BUILTIN


def test_the_models_have_under_10_megabytes_and_record_no_path_of_their_machine():
    assert sum(path.stat().st_size for path in BUILTIN.rglob("*")) < 10_000_000
    for path in BUILTIN.rglob("*.json"):
        assert "_name_or_path" not in path.read_text(), path


def test_diffusers_own_pipeline_loads_and_runs_the_base():
    from diffusers import MochiPipeline

    pipeline = MochiPipeline.from_pretrained(BUILTIN / "tiny", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline(
        "a red circle moves left on a dark background", width=64, height=64, num_frames=31, num_inference_steps=2,
        max_sequence_length=16, guidance_scale=1.5, output_type="np",
    ).frames  # fmt: skip
    assert frames.shape == (1, 31, 64, 64, 3) and np.isfinite(frames).all()


def test_the_vae_reconstructs_unseen_clips():
    model = Model(ModelSpec(weights="builtin:tiny"))
    assert reconstruction_psnr(model.vae, [draw(scene) for scene in unseen_scenes(4)]) > 31


@pytest.mark.parametrize("name", ["tiny", "tiny-pusa"])
def test_videos_show_what_their_prompt_describes(name):
    model = Model(ModelSpec(weights=f"builtin:{name}"))
    scenes = unseen_scenes(6)
    verdicts = []
    for scene in scenes:
        job = TextToVideo(id="a", prompt=scene.caption, seed=scene.seed, **job_settings(model.backbone.family))
        verdicts.append(recognize(model.decode(sample_job(job, model))).matches(scene))
    right = {what: sum(verdict[what] for verdict in verdicts) for what in verdicts[0]}
    assert right["colour"] == right["ground"] == 6 and right["shape"] >= 5 and right["motion"] >= 5, right


def test_a_new_vae_starts_as_a_good_linear_one_and_training_improves_it():
    torch.manual_seed(0)
    clips = np.stack([draw(scene) for scene in unseen_scenes(24)])
    recipe = find_tiny_recipe(DEFAULT_BACKBONE)
    vae = recipe.new_vae(to_pixels(clips))
    before = reconstruction_psnr(vae, clips[:4])
    assert before > 22
    train_vae(recipe, vae, clips, steps=12, decoder_only=True)
    assert reconstruction_psnr(vae, clips[:4]) > before
