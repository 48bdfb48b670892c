"""The command that remakes the tiny models, with few clips and steps."""

from dataclasses import replace
from pathlib import Path

import pytest

from pusa.backbones import BACKBONES, find_family
from pusa.backbones.tiny_recipe import Effort, find_tiny_recipe
from pusa.errors import ManifestError
from pusa.evaluate.measure import measure
from pusa.manifest.models import ModelSpec
from pusa.tiny.make import make, tiny_name
from pusa.weights.model import Model
from pusa.weights.resolve import is_lora

SHORT = Effort(vae_clips=8, base_clips=8, base_steps=2, pusa_clips=4, pusa_steps=1)

WITHOUT_RECIPE = replace(find_family(), name="second", tiny_recipe="")


@pytest.mark.slow
@pytest.mark.parametrize("backbone", [name for name in BACKBONES if find_family(name).tiny_recipe])
def test_the_tiny_models_are_made_and_measured_and_a_rerun_keeps_them(tmp_path, backbone):
    recipe = find_tiny_recipe(backbone)
    effort = replace(SHORT, vae_steps=(1,) * len(recipe.vae_phases))
    make(tmp_path, backbone, effort)
    name = tiny_name(find_family(backbone))
    base, fine_tuned = str(tmp_path / name), str(tmp_path / f"{name}-pusa")
    weights = sorted(path for place in (base, fine_tuned) for path in Path(place).rglob("*.safetensors"))
    assert len(weights) == 3 + len(recipe.new_text_encoders)
    after = {"weights": base, "lora": fine_tuned} if is_lora(fine_tuned) else {"weights": fine_tuned}
    specs = [ModelSpec(weights=base, backbone=backbone), ModelSpec.model_validate({"backbone": backbone, **after})]
    for spec in specs:
        assert Model(spec).transformer.config.num_layers == recipe.new_transformer().config.num_layers
    assert "first made frame, dB" in measure(*specs, count=1, steps=2).text()
    times = [path.stat().st_mtime_ns for path in weights]
    make(tmp_path, backbone, effort)
    assert [path.stat().st_mtime_ns for path in weights] == times


def test_an_unknown_backbone_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(ManifestError, match="unknown backbone 'none'; allowed are "):
        make(tmp_path, "none")
    assert not list(tmp_path.iterdir())


def test_a_family_without_a_recipe_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setitem(BACKBONES, "second", f"{__name__}:WITHOUT_RECIPE")
    with pytest.raises(ManifestError, match="backbone second has no recipe for a tiny model"):
        make(tmp_path, "second")
    assert not list(tmp_path.iterdir())
