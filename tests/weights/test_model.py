"""A model's parts on the device, and how the VAE decodes large videos."""

import numpy as np
import pytest
import torch

from pusa.backbones.mochi.backbone import Mochi
from pusa.manifest.models import ModelSpec
from pusa.weights.model import Model


@pytest.mark.parametrize("offload", [True, False])
def test_offload_keeps_one_part_on_the_device(monkeypatch, offload):
    places = {}

    def recorded(module, device):
        places[type(module)] = str(device)
        return module

    for part_class in Mochi.classes.values():
        monkeypatch.setattr(part_class, "to", recorded)
    model = Model(ModelSpec(weights="builtin:tiny", offload=offload))
    model.device = torch.device("cuda")  # the patched `to` moves nothing
    for part in ("vae", "text_encoder", "transformer", "vae", "transformer"):
        model.text_parts if part == "text_encoder" else getattr(model, part)
        on_device = {part_class for part_class, device in places.items() if device == "cuda"}
        assert on_device == ({Mochi.classes[part]} if offload else set(places))
    assert set(places) == set(Mochi.classes.values())


def test_a_large_video_is_decoded_in_chunks():
    model = Model(ModelSpec(weights="builtin:tiny"))
    seen = []
    model.vae.decoder.block_out.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[2]))
    z = torch.randn(1, 12, 4, 8, 8)
    (whole,) = model.backbone.decode_video(model.vae, z)
    assert seen == [19]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pusa.backbones.mochi.backbone.Mochi.pixels_at_once", 6 * 64 * 64)
        made = torch.cat(list(model.backbone.decode_video(model.vae, z)), 2)
        torch.testing.assert_close(made, whole, atol=1e-5, rtol=0)
    assert seen[1:] == [1, 6, 6, 6]


def test_memory_does_not_grow_with_a_long_small_video():
    model = Model(ModelSpec(weights="builtin:tiny"))
    seen = []
    model.vae.decoder.conv_in.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[2]))
    assert len(model.decode(torch.zeros(12, 30, 2, 2))) == 175
    assert seen == [12, 12, 6]


def test_a_clip_is_encoded_in_tiles_once_memory_runs_out(monkeypatch, caplog):
    model, frames = Model(ModelSpec(weights="builtin:tiny")), np.zeros((7, 96, 96, 3), np.uint8)
    whole, tiles, encode = model.encode(frames), [], Mochi.encode_video

    def limited(self, vae, x_BCTHW, tile=0):
        tiles.append(tile)
        if tile != 64:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return encode(self, vae, x_BCTHW, tile)

    monkeypatch.setattr(Mochi, "encode_video", limited)
    assert model.encode(frames).shape == whole.shape and model.encode(frames).shape == whole.shape
    assert tiles == [0, 64, 64] and "tiles of 64 pixels" in caplog.text and not model.vae.use_tiling


def test_the_vae_has_the_dtype_of_the_manifest_and_the_other_parts_have_the_devices():
    for own, expected in ((None, torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        model = Model(ModelSpec(weights="builtin:tiny", vae_dtype=own), "cpu")
        assert {weight.dtype for weight in model.vae.parameters()} == {expected} == {model.dtype_of("vae")}
        assert model.transformer.dtype == model.text_parts["text_encoder"].dtype == torch.float32
    frames = np.zeros((7, 16, 16, 3), np.uint8)
    assert model.decode(model.encode(frames)).shape == frames.shape
