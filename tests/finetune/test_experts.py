"""Fine-tunes of one of two experts: what is trained, recorded, validated and used, and which levels are drawn."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Generator

from pusa.diffusion.timesteps import DENSITIES, within
from pusa.errors import TrainingError, WeightsError
from pusa.finetune.batch import density_of
from pusa.finetune.check import check_finetune
from pusa.finetune.plan import plan
from pusa.finetune.recipe import with_overrides
from pusa.finetune.stage import finetune
from pusa.finetune.validation import validate_checkpoints
from pusa.generate.stage import generate
from pusa.ingest.stage import ingest
from pusa.manifest.models import (
    Bucket,
    ClipSettings,
    FinetuneManifest,
    GenerateManifest,
    IngestManifest,
    ModelSpec,
    PrecomputeManifest,
)
from pusa.precompute.stage import precompute
from pusa.system.files import read_object
from pusa.tiny.dataset import draw_dataset
from pusa.weights.model import Model
from pusa.weights.resolve import require_model
from tests.conftest import made_once
from tests.helpers.small_wan import write_wan_2_2_a14b

PARTS = {"high": "transformer", "low": "transformer_2"}
OTHER = {"high": "low", "low": "high"}


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """Return a folder with a small A14B in weights/, and latents that it made; for reading only."""

    def make(folder: Path) -> None:
        draw_dataset(folder / "drawn", 4)
        weights = write_wan_2_2_a14b(folder / "weights")
        clips = ClipSettings(width=32, height=32, num_frames=9, fps=24)
        ingest(IngestManifest(source=folder / "drawn/videos", backbone="wan2.2-a14b", clips=clips), folder)
        model = ModelSpec(backbone="wan2.2-a14b", weights=str(weights))
        precompute(PrecomputeManifest(clips=folder / "clips", model=model), folder)

    return made_once("a14b", tmp_path_factory, make)


def recipe(run: Path, expert: str | None = "low", base=(), **changes) -> FinetuneManifest:
    base = {"backbone": "wan2.2-a14b", "weights": str(run / "weights"), **dict(base)}
    settings = {"steps": 2, "batch_size": 4, "learning_rate": 1e-3, "checkpoint_every": 2, "latents": run / "latents"}
    return FinetuneManifest.model_validate({"base": base, "expert": expert, **settings, **changes})


def jobs(manifest: FinetuneManifest, **model) -> GenerateManifest:
    size = {"width": 32, "height": 32, "num_frames": 9, "steps": 4, "guidance": 1}
    spec = {**manifest.base.model_dump(exclude_unset=True), **model}
    return GenerateManifest.model_validate({"model": spec, "jobs": [{"id": "a", "task": "text_to_video", **size}]})


def without(run: Path, folder: Path, expert: str) -> Path:
    """Return a folder like the run's, whose model lacks an expert."""
    shutil.copytree(run / "weights", folder / "weights")
    shutil.rmtree(folder / "weights" / PARTS[expert])
    (folder / "latents").symlink_to(run / "latents")
    return folder


# What is trained.


@pytest.mark.parametrize("expert", ["high", "low"])
def test_one_expert_is_trained_and_used_where_it_belongs(run, tmp_path, expert):
    validation = {"clips": 1, "steps": 4, "guidance": 1, "device": "cpu"}
    manifest = recipe(run, expert, validation=validation)
    assert not list(check_finetune(manifest, tmp_path, print))
    alone = recipe(without(run, tmp_path / "alone", OTHER[expert]), expert)
    checkpoint = finetune(alone, tmp_path).checkpoint  # the other one need not be there
    assert [path.name for path in checkpoint.iterdir() if path.name.startswith("transformer")] == [PARTS[expert]]
    weights = checkpoint / PARTS[expert] / "diffusion_pytorch_model.safetensors"
    before = load_file(run / "weights" / PARTS[expert] / weights.name)
    assert any((after - before[name]).abs().max() > 1e-4 for name, after in load_file(weights).items())
    record = read_object(checkpoint / "checkpoint.json")
    assert (record["expert"], record["boundary"], record["backbone"]) == (expert, 0.875, "wan2.2-a14b")
    assert (record["recipe"]["expert"], record["recipe"]["level_range"]) == (expert, [0.0, 1.0])
    assert record["recipe"]["base"] == Model(manifest.base).fingerprints(PARTS[expert])[PARTS[expert]]

    assert [sheet.name for sheet in validate_checkpoints(manifest, tmp_path)] == ["00000000.jpg", "00000002.jpg"]
    sheets = [json.loads((tmp_path / f"validation/0000000{step}.json").read_text()) for step in (0, 2)]
    assert sheets[0]["base"].keys() == {"transformer", "transformer_2", "vae"} and sheets[0]["boundary"] == 0.875
    assert sheets[0]["videos"] != sheets[1]["videos"]

    tuned = jobs(manifest, checkpoint={expert: str(tmp_path / "checkpoints/last")})
    assert generate(tuned, tmp_path / "tuned").made == ["a"]
    with pytest.raises(WeightsError, match=f"has expert '{expert}'; the manifest has '{OTHER[expert]}'"):
        require_model(jobs(manifest, checkpoint={OTHER[expert]: str(checkpoint)}).model)


def test_a_lora_of_one_expert_reaches_the_feed_forward_layers_and_is_used_there_alone(run, tmp_path):
    lora = {"method": "lora", "rank": 512, "alpha": 512}
    validation = {"clips": 1, "steps": 2, "guidance": 1, "device": "cpu"}
    manifest = recipe(run, "high", train=lora, weighting="gaussian", caption_dropout=0, validation=validation)
    assert manifest.train.targets == ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
    assert manifest.density == "shifted"
    finetune(manifest, tmp_path)
    last = str(tmp_path / "checkpoints/last")
    (file,) = (tmp_path / "checkpoints/00000002/lora").glob("*.safetensors")
    names = load_file(file).keys()
    assert sum("ffn.net.0.proj" in name for name in names) == sum("ffn.net.2" in name for name in names) == 4
    assert sum("attn1" in name or "attn2" in name for name in names) == 2 * 2 * 2 * 4  # blocks, attentions, A and B
    assert len(validate_checkpoints(manifest, tmp_path)) == 2

    plain, tuned = jobs(manifest).model, jobs(manifest, loras=[{"weights": last, "expert": "high"}]).model
    require_model(tuned)
    differing = [part for part in PARTS.values() if Model(plain).fingerprints(part) != Model(tuned).fingerprints(part)]
    assert differing == ["transformer"]
    changed = Model(tuned, "cpu").denoiser(0).state_dict()
    base = Model(plain, "cpu").denoiser(0).state_dict()
    name = "blocks.0.ffn.net.0.proj.weight"
    assert not torch.equal(changed[name], base[name])
    with pytest.raises(WeightsError, match="high"):
        require_model(jobs(manifest, loras=[{"weights": last, "expert": "low"}]).model)


def test_a_run_cannot_go_on_with_the_other_expert(run, tmp_path):
    finetune(recipe(run, "low", steps=1), tmp_path)
    with pytest.raises(TrainingError, match="expert: 'low' there, 'high' here"):
        finetune(recipe(run, "high", steps=2), tmp_path)
    assert finetune(recipe(run, "low", steps=2), tmp_path).trained_steps == 1
    changed = finetune(recipe(run, "low", steps=3, level_range=[0.0, 0.875]), tmp_path, {"level_range": "[0, 0.875]"})
    record = read_object(changed.checkpoint / "checkpoint.json")
    assert record["recipe"]["level_range"] == [0.0, 0.875] and record["overrides"][0]["key"] == "level_range"


def test_a_plan_counts_only_the_expert_that_is_trained(run, tmp_path):
    shape = Bucket(width=32, height=32, num_frames=9)
    need = plan(recipe(run, "low"), shape, torch.float32)
    file = run / "weights/transformer_2/diffusion_pytorch_model.safetensors"
    assert need.parameters == need.trainable == sum(tensor.numel() for tensor in load_file(file).values())
    assert plan(recipe(without(run, tmp_path, "high"), "low"), shape, torch.float32) == need


# The manifest.


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"expert": None}, "expert is None; for wan2.2-a14b it must be one of high, low"),
        ({"expert": "middle"}, "'high' or 'low'"),
        ({"base": {"backbone": "wan2.1"}}, "for wan2.1 it must be none"),
        ({"level_range": [0.9, 0.1]}, "the first must be lower"),
        ({"level_range": [0.5, 0.5]}, "the first must be lower"),
        ({"level_range": [0, 1.5]}, "less than or equal to 1"),
        ({"level_range": [-0.1, 1]}, "greater than or equal to 0"),
        ({"level_range": [float("nan"), 1]}, "finite"),
        ({"level_range": [0.5]}, "level_range"),
        ({"level_range": "high"}, "level_range"),
    ],
)
def test_what_a_manifest_may_not_say(tmp_path, changes, problem):
    with pytest.raises(ValidationError, match=problem):
        recipe(tmp_path, **changes)


def test_the_base_of_a_lora_may_have_loras_of_the_other_expert_only(tmp_path):
    train = {"method": "lora", "rank": 2}
    own, other = ({"loras": [{"weights": "/l", "expert": expert}]} for expert in ("low", "high"))
    assert recipe(tmp_path, "low", base=other, train=train).part == "transformer_2"
    with pytest.raises(ValidationError, match="cannot be trained on top of another"):
        recipe(tmp_path, "low", base=own, train=train)
    recipe(tmp_path, "low", base=own)  # trained whole, with the LoRA merged


# Levels.


@pytest.mark.parametrize("name", DENSITIES)
@pytest.mark.parametrize(("low", "high"), [(0.875, 1.0), (0.0, 0.875), (0.3, 0.6), (0.0, 1.0)])
def test_a_range_keeps_the_shares_of_the_density_inside_it(name, low, high):
    drawn = within(DENSITIES[name], low, high)((40_000,), Generator().manual_seed(1))
    plain = DENSITIES[name]((400_000,), Generator().manual_seed(2))
    plain = plain[(plain >= low) & (plain <= high)]
    assert low <= float(drawn.min()) and float(drawn.max()) <= high
    quantiles = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    torch.testing.assert_close(drawn.quantile(quantiles), plain[:200_000].quantile(quantiles), atol=0.02, rtol=0)


def test_the_whole_range_draws_what_was_drawn_before_it_existed(tmp_path):
    assert density_of(recipe(tmp_path)) is DENSITIES["shifted"]


def test_the_levels_of_a_range_depend_on_the_generator_alone(tmp_path):
    density = density_of(recipe(tmp_path, level_range=[0.875, 1]))
    one, other = (density((1000,), Generator().manual_seed(seed)) for seed in (3, 3))
    assert torch.equal(one, other) and float(one.min()) >= 0.875


def test_a_range_that_holds_almost_nothing_of_the_density_is_refused(run, tmp_path):
    manifest = recipe(run, level_range=[0.0, 0.001])
    with pytest.raises(TrainingError, match=r"level_range is \[0, 0\.001\], in which 0\.\d\d% of the density shifted"):
        density_of(manifest)
    assert any("level_range" in line for line in check_finetune(manifest, tmp_path, print))
    with pytest.raises(TrainingError, match="level_range"):
        finetune(manifest, tmp_path)
    assert with_overrides(manifest, {"level_range": "[0, 0.9]"}).level_range == (0.0, 0.9)
