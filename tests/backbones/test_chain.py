"""Every backbone with a built-in tiny model runs the whole chain: ingest, precompute, finetune, generate."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from pusa.backbones import BACKBONES, find_family
from pusa.backbones.base import find_backbone
from pusa.data.latents import Latents
from pusa.data.reader import Table
from pusa.finetune.metrics import read_losses
from pusa.finetune.stage import finetune
from pusa.generate.stage import generate
from pusa.ingest.stage import ingest
from pusa.manifest.models import ClipSettings, FinetuneManifest, GenerateManifest, IngestManifest, PrecomputeManifest
from pusa.precompute.stage import precompute
from pusa.tiny.shapes import SIZE, clip_length
from pusa.video.media import probe
from pusa.weights.model import Model

TINY = [name for name in BACKBONES if find_family(name).tiny]
STEPS = 2


def manifests(name: str, drawn: Path, run_dir: Path):
    """Return the four manifests of a short run with a backbone's tiny model."""
    family = find_family(name)
    shape = {"width": SIZE, "height": SIZE, "num_frames": clip_length(family.geometry)}
    base = {"backbone": name, "weights": family.tiny}
    settings = {"steps": STEPS, "batch_size": 2, "checkpoint_every": STEPS, "density": "uniform"}
    defaults = {**shape, "steps": STEPS, "guidance": 1.5, "prompt": "a red circle moves left on a dark background"}
    jobs = [
        {"id": "text", "task": "text_to_video"},
        {"id": "image", "task": "image_to_video", "image": drawn / "media/ball-first.png", "multiplier": 0},
    ]
    return (
        IngestManifest(source=drawn / "videos", backbone=name, clips=ClipSettings(**shape)),
        PrecomputeManifest.model_validate({"model": base}),
        FinetuneManifest.model_validate({"base": base, **settings}),
        GenerateManifest.model_validate(
            {"model": {**base, "checkpoint": run_dir / "checkpoints/last"}, "defaults": defaults, "jobs": jobs}
        ),
    )


@pytest.mark.parametrize("name", TINY)
def test_the_whole_chain_runs_and_a_second_run_makes_nothing_again(name, drawn, tmp_path):
    geometry = find_family(name).geometry
    frames = clip_length(geometry)
    ingested, encoded, trained, generated = manifests(name, drawn, tmp_path)

    assert ingest(ingested, tmp_path).clips == 12
    assert precompute(encoded, tmp_path).rows == 12
    latents = Latents(Table.open(tmp_path / "latents"))
    mean, _ = latents.posterior([0])
    assert tuple(mean.shape[1:]) == geometry.latent_shape(SIZE, SIZE, frames) and mean.std() > 0

    result = finetune(trained, tmp_path)
    losses = [loss for _, loss in read_losses(result.metrics)]
    assert result.trained_steps == len(losses) == STEPS
    assert all(loss is not None and math.isfinite(loss) for loss in losses)
    checkpoint = Model(generated.model).transformer.state_dict()
    base = Model(trained.base).transformer.state_dict()
    assert checkpoint.keys() == base.keys()
    assert any(not torch.equal(checkpoint[key], base[key]) for key in base), "training changed no weight"

    videos = generate(generated, tmp_path)
    assert videos.made == ["text", "image"] and not videos.failed
    for job in videos.made:
        facts = probe(videos.videos / f"{job}.mp4")
        assert (facts.num_frames, facts.width, facts.height) == (frames, SIZE, SIZE)
        assert json.loads((videos.videos / f"{job}.json").read_text())["status"] == "done"

    assert ingest(ingested, tmp_path).skipped
    assert precompute(encoded, tmp_path).encoded == 0
    assert finetune(trained, tmp_path).trained_steps == 0
    assert generate(generated, tmp_path).kept == ["text", "image"]


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_transformer_is_what_the_trainer_expects_and_takes_a_level_for_each_frame(name):
    family, backbone = find_family(name), find_backbone(name)
    model = Model(manifests(name, Path("/none"), Path("/none"))[2].base)
    transformer = model.transformer
    assert isinstance(transformer, backbone.classes["transformer"])
    assert isinstance(transformer.blocks, nn.ModuleList) and len(transformer.blocks) > 1
    assert transformer.checkpoint_every_nth_block == 1 and callable(transformer.share_frames)
    assert set(family.parts) >= {*family.transformers, *family.vaes, *family.text_encoders}
    generator = torch.Generator().manual_seed(0)
    shape = family.geometry.latent_shape(SIZE, SIZE, clip_length(family.geometry))
    z_BCFhw = torch.randn(1, *shape, generator=generator)
    text = model.encode_text(["a red circle"])
    levels_BF = torch.full((1, shape[1]), 0.5)
    changed_BF = levels_BF.clone()
    changed_BF[:, -1] = 0.9
    with torch.no_grad():
        equal, changed = (backbone.predict(transformer, z_BCFhw, sigma, text) for sigma in (levels_BF, changed_BF))
    effect_F = (changed - equal).abs().mean((0, 1, 3, 4))
    assert equal.shape == z_BCFhw.shape and effect_F.argmax() == shape[1] - 1
