"""The command that remakes the family, at a fraction of its length."""

import pytest

from pusa.evaluate.measure import measure
from pusa.manifest.models import ModelSpec
from pusa.tiny import make
from pusa.weights.model import Model

SHORT = {
    "VAE_CLIPS": 8,
    "BASE_CLIPS": 8,
    "PUSA_CLIPS": 4,
    "VAE_STEPS": 1,
    "DECODER_STEPS": 1,
    "BASE_STEPS": 2,
    "PUSA_STEPS": 1,
}


@pytest.mark.slow
def test_the_family_is_made_measured_and_not_made_twice(tmp_path, monkeypatch):
    for name, value in SHORT.items():
        monkeypatch.setattr(make, name, value)
    make.make(tmp_path)
    weights = sorted(path for path in tmp_path.glob("tiny*/*/*.safetensors"))
    assert len(weights) == 4
    specs = [ModelSpec(weights=str(tmp_path / name)) for name in ("tiny", "tiny-pusa")]
    for spec in specs:
        assert Model(spec).transformer.config.num_layers == 4
    assert "first made frame, dB" in measure(*specs, count=1, steps=2).text()
    times = [path.stat().st_mtime_ns for path in weights]
    make.make(tmp_path)
    assert [path.stat().st_mtime_ns for path in weights] == times
