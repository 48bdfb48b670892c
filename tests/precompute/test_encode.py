"""Encoders fit into the memory there is; rows are finite, and independent of the batch."""

import numpy as np
import pytest
import torch

from pusa.errors import NoMemoryError, Reason, Rejected
from pusa.manifest.models import ModelSpec
from pusa.precompute.encode import latents_row, text_rows
from pusa.weights.memory import VideoEncoder
from pusa.weights.model import Model
from tests.helpers.synthetic_tables import clips


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(ModelSpec(weights="builtin:tiny"))


def limit_memory(monkeypatch, model, limit):
    """Run out of memory if a pass has more than `limit` pixels a frame, in all its clips; tiles count as frames."""
    encode = type(model.backbone).encode_video

    def limited(self, vae, x_BCTHW, tile=0):
        sides = [min(side, tile or side) for side in x_BCTHW.shape[-2:]]
        if len(x_BCTHW) * sides[0] * sides[1] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a lot")
        return encode(self, vae, x_BCTHW, tile)

    monkeypatch.setattr(type(model.backbone), "encode_video", limited)


def frames(count, size):
    return np.random.default_rng(0).integers(0, 256, (count, 7, size, size, 3), np.uint8)


def test_with_less_memory_fewer_clips_are_encoded_at_a_time_and_the_result_is_the_same(model, monkeypatch, caplog):
    whole = VideoEncoder(model).encode(frames(4, 64))
    limit_memory(monkeypatch, model, 64 * 64)
    encoder = VideoEncoder(model)
    mean, logvar, tile = encoder.encode(frames(4, 64))
    torch.testing.assert_close(mean, whole[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logvar, whole[1], atol=1e-4, rtol=1e-4)
    assert tile == 0 and len(caplog.records) == 2  # two clips at a time, then one
    encoder.encode(frames(4, 64))
    assert len(caplog.records) == 2  # the setting that worked is kept


def test_with_even_less_memory_tiles_are_used_and_recorded(model, monkeypatch):
    whole, _, _ = VideoEncoder(model).encode(frames(1, 192))
    limit_memory(monkeypatch, model, 128 * 128)
    mean, _, tile = VideoEncoder(model).encode(frames(1, 192))
    assert tile == 128 and mean.shape == whole.shape and not model.vae.use_tiling
    assert (mean - whole).abs().mean() < 0.3 * whole.abs().mean()


def test_too_little_memory_for_the_smallest_tile_is_an_error(model, monkeypatch):
    limit_memory(monkeypatch, model, 10)
    with pytest.raises(
        NoMemoryError, match="a clip of 7 frames of 96x96 does not fit in memory, not even in tiles of 64"
    ):
        VideoEncoder(model).encode(frames(2, 96))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_latents_that_are_not_finite_are_rejected(value):
    mean = torch.zeros(4, 2, 2, 2)
    mean[1, 1, 0, 0] = value
    (clip,) = clips({"16x16x7": 1}).to_pylist()
    with pytest.raises(Rejected, match="1 of 32 values of the latents' logvar are not finite in float16") as error:
        latents_row("k", clip, torch.zeros_like(mean), mean, 0, "float16", "raw")
    assert error.value.reason == Reason.NOT_FINITE


def test_features_of_a_caption_do_not_depend_on_its_batch(model):
    captions = {"a": "a red circle moves left on a dark background", "b": "a green square", "c": ""}
    rows = {row["text_key"]: row for row in text_rows(captions, model, 2, "float32", "raw")}
    assert list(rows) == ["a", "b", "c"]
    for key, caption in captions.items():
        alone = model.encode_text([caption])
        valid = alone.features[0][alone.mask[0]] if caption else alone.features[0]
        stored = torch.frombuffer(bytearray(rows[key]["text"]), dtype=torch.float32).view(valid.shape)
        torch.testing.assert_close(stored, valid, atol=1e-5, rtol=1e-5)
        assert rows[key]["tokens"] == int(alone.mask.sum())
