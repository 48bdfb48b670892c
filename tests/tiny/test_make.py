"""The command that remakes the tiny models, with few clips and steps."""

import pytest

from pusa.backbones import BACKBONES
from pusa.errors import ManifestError
from pusa.evaluate.measure import measure
from pusa.manifest.models import ModelSpec
from pusa.tiny.make import Effort, make
from pusa.weights.model import Model

SHORT = Effort(
    vae_clips=8, vae_steps=1, decoder_steps=1, base_clips=8, base_steps=2, pusa_clips=4, pusa_steps=1
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_tiny_models_are_made_and_measured_and_a_rerun_keeps_them(tmp_path, backbone):
    make(tmp_path, backbone, SHORT)
    weights = sorted(path for path in tmp_path.glob("tiny*/*/*.safetensors"))
    assert len(weights) == 4
    specs = [ModelSpec(weights=str(tmp_path / name), backbone=backbone) for name in ("tiny", "tiny-pusa")]
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
