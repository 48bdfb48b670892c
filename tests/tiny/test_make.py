"""The command that remakes the tiny models, with few clips and steps."""

from dataclasses import replace
from pathlib import Path

import pytest

from pusa.backbones import BACKBONES, find_family
from pusa.backbones.tiny_recipe import Effort
from pusa.errors import ManifestError
from pusa.evaluate.measure import measure
from pusa.manifest.models import ModelSpec
from pusa.tiny.make import make, tiny_name
from pusa.weights.model import Model
from pusa.weights.resolve import is_lora

SHORT = Effort(
    vae_clips=8, vae_steps=1, decoder_steps=1, base_clips=8, base_steps=2, pusa_clips=4, pusa_steps=1
)  # fmt: skip

WITHOUT_RECIPE = replace(find_family(), name="second", tiny_recipe="")


@pytest.mark.slow
@pytest.mark.parametrize("backbone", [name for name in BACKBONES if find_family(name).tiny_recipe])
def test_the_tiny_models_are_made_and_measured_and_a_rerun_keeps_them(tmp_path, backbone):
    make(tmp_path, backbone, SHORT)
    name = tiny_name(find_family(backbone))
    base, fine_tuned = str(tmp_path / name), str(tmp_path / f"{name}-pusa")
    weights = sorted(path for place in (base, fine_tuned) for path in Path(place).rglob("*.safetensors"))
    assert len(weights) == 4
    after = {"weights": base, "lora": fine_tuned} if is_lora(fine_tuned) else {"weights": fine_tuned}
    specs = [ModelSpec(weights=base, backbone=backbone), ModelSpec.model_validate({"backbone": backbone, **after})]
    for spec in specs:
        assert Model(spec).transformer.config.num_layers == 4
    assert "first made frame, dB" in measure(*specs, count=1, steps=2).text()
    times = [path.stat().st_mtime_ns for path in weights]
    make(tmp_path, backbone, SHORT)
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
