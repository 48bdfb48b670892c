"""HunyuanVideo's VAE: the function is diffusers' with the original's tiles, which streams, and says what decided it."""

from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import HunyuanVideoMidBlock3D

from pusa.backbones import find_family
from pusa.backbones.base import find_backbone
from pusa.backbones.dry_run import FusedAttention, PeakMemory
from pusa.backbones.hunyuan_video.backbone import HunyuanVideo
from pusa.backbones.hunyuan_video.vae import FramewiseMidBlock3D, PusaAutoencoderKLHunyuanVideo
from pusa.errors import ConditionError, NoMemoryError
from pusa.generate.encodings import Encodings
from pusa.generate.plan import plan
from pusa.manifest.models import GenerateManifest
from pusa.precompute.rows import plan_rows
from pusa.weights.memory import VideoDecoder, VideoEncoder
from pusa.weights.model import Model
from tests.helpers.small_hunyuan_model import write_hunyuan
from tests.helpers.synthetic_tables import FINGERPRINTS, clips

CONFIG = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}
TILES = (16, 24, 16, 8, 16, 12)  # of height, width and frames, and how far each starts after the one before
SHAPES = [(1, 16, 24), (13, 8, 40), (17, 32, 24), (29, 24, 40), (49, 16, 8)]  # frames, height, width


def pair(**config):
    """diffusers' VAE and ours with the same random weights, which all count."""
    torch.manual_seed(0)
    base = AutoencoderKLHunyuanVideo(**CONFIG, **config).eval()
    with torch.no_grad():
        for weight in base.parameters():
            if weight.ndim < 3:  # biases start as small values, and norms as 1
                weight.add_(torch.randn_like(weight), alpha=0.1)
    ours = PusaAutoencoderKLHunyuanVideo(**CONFIG, **config).eval()
    ours.load_state_dict(base.state_dict())
    for vae in (base, ours):
        vae.enable_tiling(*TILES)
    return base, ours


@pytest.fixture(scope="module")
def vaes():
    return pair()


def clip(frames, height=16, width=24, samples=1):
    return torch.rand(samples, 3, frames, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def latents(frames, height=2, width=3, samples=1):
    return torch.randn(samples, 16, frames, height, width, generator=torch.Generator().manual_seed(2))


def latents_of(frames):
    return 1 + (frames - 1) // 4


@torch.no_grad()
def both_ways(vae, x, z):
    return vae.encode(x).latent_dist.parameters, vae.decode(z).sample


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_in_time_and_space_are_diffusers_with_the_same_numbers_bit_by_bit(dtype):
    """Without attention, whose sums are in another order."""
    base, ours = (vae.to(dtype) for vae in pair(mid_block_add_attention=False))
    for frames, height, width in SHAPES:
        x, z = clip(frames, height, width).to(dtype), latents(latents_of(frames), height // 8, width // 8).to(dtype)
        for found, expected in zip(both_ways(ours, x, z), both_ways(base, x, z), strict=True):
            assert expected.std() > 0.05 and torch.equal(found, expected), (frames, height, width)


@pytest.mark.parametrize("shape", SHAPES[1:4])
def test_with_attention_it_is_diffusers_too(vaes, shape):
    base, ours = vaes
    frames, height, width = shape
    x, z = clip(*shape, samples=2), latents(latents_of(frames), height // 8, width // 8, samples=2)
    for found, expected in zip(both_ways(ours, x, z), both_ways(base, x, z), strict=True):
        assert expected.std() > 0.05 and found.shape == expected.shape
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@torch.no_grad()
def test_attention_frame_by_frame_is_the_masked_one():
    torch.manual_seed(0)
    base = HunyuanVideoMidBlock3D(64, resnet_groups=4, attention_head_dim=64).eval()
    ours = HunyuanVideoMidBlock3D(64, resnet_groups=4, attention_head_dim=64).eval()
    ours.load_state_dict(base.state_dict())
    ours.__class__ = FramewiseMidBlock3D
    x = torch.randn(2, 64, 5, 4, 6)
    torch.testing.assert_close(ours(x), base(x), atol=1e-6, rtol=1e-6)
    base.attentions[0].to_q.weight.zero_()  # so that attention is a mean, and counts
    assert (ours(x) - base(x)).abs().max() > 1e-3


def test_attention_needs_no_mask_of_all_pairs():
    with torch.device("meta"):
        block = FramewiseMidBlock3D(512, attention_head_dim=512).eval()
        x = torch.empty(1, 512, 17, 32, 32)
    with torch.no_grad(), FusedAttention(), PeakMemory() as memory:
        block(x)
    assert (
        memory.peak < 10 * x.nbytes < x[0, 0].numel() ** 2 * 4 / 3
    )  # the mask alone would be more than three times that


def test_the_numbers_are_the_originals_and_tiling_is_always_on():
    vae = PusaAutoencoderKLHunyuanVideo(**CONFIG)
    assert vae.use_tiling
    assert (vae.tile_sample_min_height, vae.tile_sample_min_width, vae.tile_sample_min_num_frames) == (256, 256, 64)
    assert vae.tile_sample_stride_height == vae.tile_sample_stride_width == 192
    assert vae.tile_sample_stride_num_frames == 48


@torch.no_grad()
def test_a_video_comes_tile_by_tile_and_the_number_at_once_changes_nothing(vaes):
    _, ours = vaes
    z = latents(13, 3, 2)
    whole = ours.decode(z).sample
    for at_once in (1, 5, 100):
        chunks = list(ours.decode_chunks(z, at_once))
        assert [chunk.shape[2] for chunk in chunks] == [13, 12, 12, 12]
        assert torch.equal(torch.cat(chunks, 2), whole)
    x = clip(49, 8, 32)
    chunks = list(ours.encode_chunks(x))
    assert [chunk.shape[2] for chunk in chunks] == [4, 3, 3, 3]
    assert torch.equal(torch.cat(chunks, 2), ours.encode(x).latent_dist.parameters)


def test_memory_does_not_grow_with_the_length(vaes):
    """Beside what is given and what is yielded: at most the frames of two tiles are there."""
    _, ours = vaes

    def peak(chunks):
        with torch.no_grad(), PeakMemory() as memory:
            deque(chunks, maxlen=0)
        return memory.peak

    x, z = clip(73), latents(19)
    assert peak(ours.decode_chunks(z, 1)) == peak(ours.decode_chunks(z[:, :, :10], 1))
    assert peak(ours.encode_chunks(x)) == peak(ours.encode_chunks(x[:, :, :37]))


@pytest.mark.parametrize("frames", [2, 28, 80])
def test_a_length_that_the_base_model_would_cut_is_refused(vaes, frames):
    _, ours = vaes
    below = (frames - 1) // 4 * 4 + 1
    for call in (ours.encode, lambda x: list(ours.encode_chunks(x, 16))):
        with pytest.raises(ConditionError, match=f"{frames} is not 4k \\+ 1; the nearest are {below} and {below + 4}"):
            call(clip(frames))


def test_a_size_that_the_base_model_would_cut_is_refused(vaes):
    with pytest.raises(ConditionError, match="width 52 is not a multiple"):
        vaes[1].encode(clip(5, width=52))


@torch.no_grad()
def test_uint8_frames_become_floats_tile_by_tile(vaes):
    _, ours = vaes
    frames = torch.randint(0, 256, (1, 3, 29, 16, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen = []
    hook = ours.encoder.register_forward_pre_hook(lambda _, args: seen.append((*args[0].shape[2:], args[0].dtype)))
    found = torch.cat(list(ours.encode_chunks(frames)), 2)
    hook.remove()
    rows = [(high, wide) for high in (16, 8) for wide in (24, 24, 8)]
    assert seen == [(frames, *size, torch.float32) for frames in (17, 17, 5) for size in rows]
    assert torch.equal(found, torch.cat(list(ours.encode_chunks(frames.float() / 127.5 - 1)), 2))


@pytest.mark.parametrize("tile", [8, 24, 1000])
@torch.no_grad()
def test_tiles_of_any_size_cover_the_whole(vaes, tile):
    _, ours = vaes
    x, z = clip(5, 24, 32), latents(2, 3, 4)
    found, expected = (torch.cat(list(ours.decode_chunks(z, 1, side)), 2) for side in (tile, 0))
    assert found.shape == expected.shape and (found - expected).abs().max() > 1e-3
    found, expected = (torch.cat(list(ours.encode_chunks(x, side)), 2) for side in (tile, 0))
    assert found.shape == expected.shape and (found - expected).abs().max() > 1e-3


def test_gradients_are_the_base_models_through_tiles(vaes):
    gradients = []
    for vae in vaes:
        vae.zero_grad()
        moments = vae.encode(clip(17, 24, 8)).latent_dist.parameters
        vae.decode(moments.chunk(2, 1)[0]).sample.square().mean().backward()
        gradients.append({name: weight.grad.clone() for name, weight in vae.named_parameters()})
        vae.zero_grad()
    for name, gradient in gradients[0].items():
        largest = float(gradient.abs().max())
        assert largest > 0 or "to_k.bias" in name, name
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-3 * largest + 1e-7, rtol=0, msg=name)


def test_parameters_and_configuration_keep_their_names(vaes, tmp_path):
    base, ours = vaes
    assert list(ours.state_dict()) == list(base.state_dict())
    assert dict(ours.config) == dict(base.config)
    ours.save_pretrained(tmp_path)
    again = PusaAutoencoderKLHunyuanVideo.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again.decode(latents(2)).sample, ours.decode(latents(2)).sample)


@torch.no_grad()
def test_a_picture_alone_is_not_the_first_frame_of_its_clip(vaes):
    """The VAE is not causal: what image_to_video gives the network is a picture as the VAE sees pictures."""
    _, ours = vaes
    x = clip(13)
    alone, first = (ours.encode(part).latent_dist.mean[:, :, 0] for part in (x[:, :, :1], x))
    assert (alone - first).abs().max() > 1e-2


@torch.no_grad()
def test_the_backbone_gives_what_diffusers_pipeline_makes_of_a_clip():
    """As HunyuanVideoPipeline: latents times the scaling factor; small clips are encoded together."""
    base, ours = pair()
    for vae in (base, ours):
        vae.enable_tiling(256, 256, 64, 192, 192, 48)
    backbone, x = HunyuanVideo(), clip(9, samples=3)
    mean, logvar = backbone.encode_video(ours, x)
    expected = base.encode(x).latent_dist
    torch.testing.assert_close(mean, expected.mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(logvar, expected.logvar, atol=1e-5, rtol=0)
    center, deviation = backbone.latent_statistics(ours)
    torch.testing.assert_close((mean - center) / deviation, mean * base.config.scaling_factor)
    found = torch.cat(list(backbone.decode_video(ours, mean)), 2)
    torch.testing.assert_close(found, base.decode(mean).sample.clamp(-1, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("frames", "size", "passes"), [(5, 32, 1), (65, 256, 3), (65, 304, 3)])
def test_small_clips_are_encoded_together_and_large_ones_alone(frames, size, passes):
    calls = []

    def encode_chunks(x, tile):
        calls.append(len(x))
        yield torch.zeros(len(x), 32, 1, 1, 1)

    shape = (3, 3, frames, size, size)
    mean, _ = HunyuanVideo().encode_video(SimpleNamespace(encode_chunks=encode_chunks), torch.empty(shape))
    assert len(calls) == passes and sum(calls) == len(mean) == 3


def short_of_memory(limit):
    """A model whose VAE runs out of memory with tiles of more than `limit` pixels; and the tiles that it was given."""
    _, vae = pair()
    vae.enable_tiling(256, 256, 64, 192, 192, 48)
    backbone, tried = HunyuanVideo(), []

    def limited(work, before):
        def call(x):
            tried.append(max(x.shape[-2:]) * before)
            if tried[-1] > limit:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a lot")
            return work(x)

        return call

    vae._encode_tile, vae._decode_tile = limited(vae._encode_tile, 1), limited(vae._decode_tile, 8)

    def posterior(frames_BTHWC, tile):
        return backbone.encode_video(vae, torch.from_numpy(frames_BTHWC).movedim(-1, 1), tile)

    return SimpleNamespace(backbone=backbone, vae=vae, posterior=posterior), tried


def test_without_memory_for_a_tile_smaller_ones_are_tried_at_once(caplog):
    model, tried = short_of_memory(128)
    decoder = VideoDecoder(model)
    z_CFhw = latents(2, 34, 2)[0]
    frames = np.concatenate(list(decoder.decode(z_CFhw)))
    assert frames.shape == (5, 272, 16, 3) and decoder.tile_of(z_CFhw) == 128
    assert tried[:2] == [256, 128] and len(caplog.records) == 1  # fewer latent frames would not help
    tried.clear()
    mean, _, tile = VideoEncoder(model).encode(np.zeros((1, 5, 272, 16, 3), np.uint8))
    assert tile == 128 and mean.shape == (1, 16, 2, 34, 2) and tried[:2] == [256, 128]
    model, _ = short_of_memory(10)
    with pytest.raises(
        NoMemoryError, match="2 latent frames of 16x272 does not fit in memory, not even in tiles of 64"
    ):
        list(VideoDecoder(model).decode(z_CFhw))
    with pytest.raises(NoMemoryError, match=r"clip of 1 frames of 64x64 .* alone \(it is too small for tiles\)"):
        VideoEncoder(model).encode(np.zeros((1, 1, 64, 64, 3), np.uint8))


def test_with_memory_enough_the_familys_own_tiles_are_none_for_the_records():
    model, tried = short_of_memory(1000)
    _, _, tile = VideoEncoder(model).encode(np.zeros((1, 1, 272, 16, 3), np.uint8))
    assert tile == 0 and tried == [256, 80]  # the rows from 192 on are the second tile


@torch.no_grad()
def test_a_ring_is_decoded_through_the_tiles(vaes):
    _, ours = vaes
    model = Model.__new__(Model)
    model.backbone, model._decoder = HunyuanVideo(), VideoDecoder(SimpleNamespace(backbone=HunyuanVideo(), vae=ours))
    model.space = SimpleNamespace(leave=lambda z: z)
    z = latents(5)[0]
    ring, twice = model.decode_ring(z), model.decode(torch.cat([z, z], 1))
    assert len(ring) == 20 and np.array_equal(ring, np.concatenate([twice[19:], twice[17:19]]))


def test_tile_settings_are_part_of_the_keys_of_this_family_alone():
    """The keys of other families are what they were: rows that exist are not made again."""
    table = clips({"64x64x31": 1})
    everything = {**FINGERPRINTS, "text_encoder_2": "t2", "tokenizer_2": "k2"}
    for name in ("mochi", "wan2.1"):
        family = find_family(name)
        assert not family.latent_settings
        assert plan_rows(table, "bfloat16", family, FINGERPRINTS).keys == ["1ba0c31839047a991ecd7059d1fd4f13"]
        with_dtype = plan_rows(table, "bfloat16", family, FINGERPRINTS, "float32")
        assert with_dtype.keys == ["36175f597345a956abdf61229d209a7b"]
    family = find_family("hunyuan_video")
    assert set(family.latent_settings.values()) == {256, 192, 64, 48}
    own = plan_rows(table, "bfloat16", family, everything).keys
    assert own != ["1ba0c31839047a991ecd7059d1fd4f13"]
    assert own != plan_rows(table, "bfloat16", family, everything, "float32").keys


def test_tile_settings_are_part_of_the_keys_of_kept_encodings():
    for name, settings in (("mochi", {}), ("hunyuan_video", {"tile": 256, "tile_frames": 64})):
        model = SimpleNamespace(backbone=find_backbone(name), fingerprints=lambda *parts: dict.fromkeys(parts, "f"))
        found = Encodings(model, None)._vae_weights
        assert found.items() >= {"vae": "f", **settings}.items() and len(found) == (5 if settings else 1)


def test_a_plan_finds_the_job_with_the_largest_tile_not_the_most_pixels(tmp_path):
    """768x768 with 2 latent frames are more pixels than 256x256 with 17, but in tiles of fewer frames."""
    weights = write_hunyuan(tmp_path)
    sizes = {"wide": (768, 5), "long": (256, 65)}
    jobs = [
        {"id": id, "task": "text_to_video", "prompt": "", "width": side, "height": side, "num_frames": frames}
        for id, (side, frames) in sizes.items()
    ]
    manifest = GenerateManifest.model_validate(
        {"model": {"backbone": "hunyuan_video", "weights": weights}, "jobs": jobs}
    )
    (vae,) = (part for part in plan(manifest, torch.float32).parts if part.part == "vae")
    assert vae.job.startswith("long")
