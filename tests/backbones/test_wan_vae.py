"""Wan's VAE in longer chunks: the same function as diffusers', exactly causal, and nothing of a clip is dropped."""

from itertools import zip_longest

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

from pusa.backbones import find_family
from pusa.backbones.base import find_backbone
from pusa.backbones.wan.vae import PusaAutoencoderKLWan
from pusa.errors import ConditionError
from tests.helpers.small_wan import VAE, VAE_5B

CONFIGS = {"wan2.1": VAE, "wan2.2-5b": VAE_5B}
FRAMES = [1, 17]  # 17 are 5 latent frames: after the first, two chunks of 2, or chunks of 3 and 1


def pair(config):
    """diffusers' VAE and ours with the same random weights."""
    torch.manual_seed(0)
    base = AutoencoderKLWan(**config).eval()
    with torch.no_grad():
        for weight in base.parameters():
            if weight.ndim < 3:  # biases start as small values
                weight.add_(torch.randn_like(weight), alpha=0.1)
    ours = PusaAutoencoderKLWan(**config).eval()
    ours.load_state_dict(base.state_dict())
    return base, ours


@pytest.fixture(scope="module", params=CONFIGS)
def vaes(request):
    return pair(CONFIGS[request.param])


def clip(frames, height=32, width=48, samples=2):
    return torch.rand(samples, 3, frames, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def latents(vae, frames, height=2, width=3):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, vae.config.z_dim, frames, height, width, generator=generator)


def latents_of(frames):
    return 1 + (frames - 1) // 4


@torch.no_grad()
def encode(vae, x, at_once=1, tile=0):
    return torch.cat(list(vae.encode_chunks(x, at_once, tile)), 2)


@torch.no_grad()
def decode(vae, z, at_once=1, tile=0):
    return torch.cat(list(vae.decode_chunks(z, at_once, tile)), 2)


@pytest.mark.parametrize("frames", FRAMES)
@torch.no_grad()
def test_chunks_of_any_length_encode_as_the_base_model(vaes, frames):
    base, ours = vaes
    expected = base.encode(clip(frames)).latent_dist
    assert expected.mean.std() > 0.05
    for at_once in (1, 2, 3, 9):
        ours.latent_frames_at_once = at_once
        found = ours.encode(clip(frames)).latent_dist
        for name in ("mean", "logvar"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-5, rtol=0)


@pytest.mark.parametrize("frames", FRAMES)
@torch.no_grad()
def test_chunks_of_any_length_decode_as_the_base_model(vaes, frames):
    base, ours = vaes
    z = latents(ours, latents_of(frames))
    expected = base.decode(z).sample
    assert expected.std() > 0.05 and expected.shape[2] == frames
    for at_once in (1, 2, 3, 9):
        ours.latent_frames_at_once = at_once
        torch.testing.assert_close(ours.decode(z).sample, expected, atol=1e-5, rtol=0)


def test_the_first_latent_frame_comes_alone(vaes):
    _, ours = vaes
    with torch.no_grad():
        decoded = [chunk.shape[2] for chunk in ours.decode_chunks(latents(ours, 6), 2)]
        encoded = [chunk.shape[2] for chunk in ours.encode_chunks(clip(21), 2)]
    assert (encoded, decoded) == ([1, 2, 2, 1], [1, 8, 8, 4])


@pytest.mark.parametrize("at_once", [1, 3])
def test_the_past_never_depends_on_the_future(vaes, at_once):
    _, ours = vaes
    x, z = clip(17, samples=1), latents(ours, 5)
    encoded, decoded = encode(ours, x, at_once), decode(ours, z, at_once)
    for kept in (1, 3):
        other_x, other_z = x.clone(), z.clone()
        other_x[:, :, ours.geometry.num_frames(kept) :] = 1
        other_z[:, :, kept:] = 1
        for before, after, length in (
            (encoded, encode(ours, other_x, at_once), kept),
            (decoded, decode(ours, other_z, at_once), ours.geometry.num_frames(kept)),
        ):
            assert torch.equal(before[:, :, :length], after[:, :, :length])
            assert (before[:, :, length] - after[:, :, length]).abs().max() > 1e-3


@pytest.mark.parametrize("frames", [2, 28, 80])
def test_a_length_that_the_base_model_would_cut_is_refused(vaes, frames):
    _, ours = vaes
    below = (frames - 1) // 4 * 4 + 1
    for call in (ours.encode, lambda x: encode(ours, x, 2)):
        with pytest.raises(ConditionError, match=f"{frames} is not 4k \\+ 1; the nearest are {below} and {below + 4}"):
            call(clip(frames))


def test_a_size_that_the_base_model_would_cut_is_refused(vaes):
    _, ours = vaes
    with pytest.raises(ConditionError, match="width 52 is not a multiple"):
        encode(ours, clip(5, width=52))
    ours.enable_tiling(16, 16, 8, 8)
    with pytest.raises(ConditionError, match="28 is not 4k"):
        ours.encode(clip(28))
    ours.disable_tiling()


def test_a_chunk_of_no_frame_is_refused(vaes):
    with pytest.raises(ValueError, match="latent_frames is 0; expected 1 or more"):
        decode(vaes[1], latents(vaes[1], 2), 0)


@torch.no_grad()
def test_streams_that_take_turns_do_not_share_caches(vaes):
    _, ours = vaes
    first, second = latents(ours, 4), -latents(ours, 5)
    streams = ours.decode_chunks(first, 1), ours.decode_chunks(second, 2), ours.encode_chunks(clip(13), 1)
    chunks = list(zip_longest(*streams))
    expected = decode(ours, first), decode(ours, second, 2), encode(ours, clip(13))
    for taken, whole in zip(zip(*chunks, strict=True), expected, strict=True):
        assert torch.equal(torch.cat([chunk for chunk in taken if chunk is not None], 2), whole)


@torch.no_grad()
def test_tiles_are_decoded_and_encoded_in_chunks_as_diffusers_tiles_the_whole():
    """Each tile remembers its own past. In space they are cut and blended alike."""
    base, ours = pair(VAE)
    base.enable_tiling(32, 32, 24, 24)
    z, x = latents(ours, 3, height=5, width=7)[:1], clip(9, height=40, width=56, samples=1)
    for found, expected, untiled in (
        (decode(ours, z, 2, tile=32).clamp(-1, 1), base.decode(z).sample, decode(ours, z).clamp(-1, 1)),
        (encode(ours, x, 2, tile=32), base.encode(x).latent_dist.parameters, encode(ours, x)),
    ):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        assert (found - untiled).abs().max() > 1e-3


@torch.no_grad()
def test_tiles_of_one_size_with_the_whole_change_nothing(vaes):
    _, ours = vaes
    z, x = latents(ours, 3), clip(9)
    assert torch.equal(decode(ours, z, 2, tile=64), decode(ours, z, 2))
    assert torch.equal(encode(ours, x, 2, tile=64), encode(ours, x, 2))


@pytest.mark.parametrize("tile", [1, 16, 32, 1000])
@torch.no_grad()
def test_tiles_of_any_size_cover_the_whole(vaes, tile):
    _, ours = vaes
    assert decode(ours, latents(ours, 2)[:1], 2, tile).shape == decode(ours, latents(ours, 2)[:1], 2).shape
    assert encode(ours, clip(5, samples=1), 2, tile).shape == encode(ours, clip(5, samples=1), 2).shape


def test_with_tiling_it_is_the_base_model(vaes):
    base, ours = vaes
    for vae in (base, ours):
        vae.enable_tiling(32, 32, 16, 16)
    z = latents(ours, 2, height=4, width=5)[:1]
    assert torch.equal(ours.decode(z).sample, base.decode(z).sample)
    for vae in (base, ours):
        vae.disable_tiling()


def test_uint8_frames_become_floats_chunk_by_chunk(vaes):
    _, ours = vaes
    frames = torch.randint(0, 256, (1, 3, 21, 32, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen = []
    hook = ours.encoder.register_forward_pre_hook(lambda _, args: seen.append((args[0].shape[2], args[0].dtype)))
    found = encode(ours, frames, 2)
    hook.remove()
    assert torch.equal(found, encode(ours, frames.float() / 127.5 - 1, 2))
    assert seen == [(1, torch.float32), (8, torch.float32), (8, torch.float32), (4, torch.float32)]


def test_the_caches_do_not_keep_chunks_in_memory(vaes):
    _, ours = vaes
    caches = [None] * ours._cached_conv_counts["decoder"]
    with torch.no_grad():
        for number, chunk in enumerate(latents(ours, 9).tensor_split([1, 5], 2)):
            ours._decode_part(chunk, caches, number == 0)
    kept = [cache for cache in caches if isinstance(cache, torch.Tensor)]
    assert kept and all(cache.shape[2] == 2 for cache in kept)
    assert all(cache.untyped_storage().nbytes() == cache.numel() * cache.element_size() for cache in kept)


def test_gradients_flow_through_chunks_also_where_pixels_are_out_of_range(vaes):
    _, ours = vaes
    x, gradients = clip(9, samples=1), []
    for at_once in (1, 2):
        ours.zero_grad()
        moments = torch.cat(list(ours.encode_chunks(x, at_once)), 2)
        pixels = torch.cat(list(ours.decode_chunks(3 * moments.chunk(2, 1)[0], at_once)), 2) * 9
        assert (pixels.abs() > 1).float().mean() > 0.2
        pixels.square().mean().backward()
        gradients.append({name: weight.grad.clone() for name, weight in ours.named_parameters()})
        ours.zero_grad()
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        largest = float(gradient.abs().max())
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-4 * largest + 1e-7, rtol=0, msg=name)


def test_parameters_and_configuration_keep_their_names(vaes, tmp_path):
    base, ours = vaes
    assert list(ours.state_dict()) == list(base.state_dict())
    assert dict(ours.config) == dict(base.config)
    ours.save_pretrained(tmp_path)
    again = PusaAutoencoderKLWan.from_pretrained(tmp_path)
    assert torch.equal(decode(again, latents(ours, 3), 2), decode(ours, latents(ours, 3), 2))


@pytest.mark.parametrize("name", ["wan2.1", "wan2.2-a14b", "wan2.2-5b"])
def test_the_backbone_gives_what_diffusers_pipeline_makes_of_a_clip(name):
    """As WanPipeline and WanImageToVideoPipeline: latents (mean - mean) / std, pixels clamped."""
    base, ours = pair(CONFIGS.get(name, VAE))
    backbone, x = find_backbone(name), clip(9, samples=1)
    assert ours.geometry.num_frames(3) == 9 and ours.geometry.spatial == find_family(name).geometry.spatial
    mean, logvar = backbone.encode_video(ours, x)
    with torch.no_grad():
        expected = base.encode(x).latent_dist
    torch.testing.assert_close(mean, expected.mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(logvar, expected.logvar, atol=1e-5, rtol=0)
    center, deviation = backbone.latent_statistics(ours)
    z_dim = ours.config.z_dim
    assert torch.equal(center, torch.tensor(base.config.latents_mean).view(z_dim, 1, 1, 1))
    assert torch.equal(1 / deviation, 1.0 / torch.tensor(base.config.latents_std).view(z_dim, 1, 1, 1))
    found = torch.cat(list(backbone.decode_video(ours, mean)), 2)
    with torch.no_grad():
        torch.testing.assert_close(found, base.decode(mean).sample, atol=1e-5, rtol=0)
    assert found.abs().max() <= 1


@pytest.mark.parametrize(
    ("name", "width", "height", "frames", "expected"),
    [
        ("wan2.1", 832, 480, 21, 4),
        ("wan2.1", 1280, 720, 21, 1),
        ("wan2.1", 64, 64, 8, 8),
        ("wan2.1", 64, 64, 100, 12),
        ("wan2.2-5b", 1280, 704, 31, 1),
        ("wan2.2-5b", 832, 480, 31, 4),
    ],
)
def test_memory_decides_how_many_latent_frames_are_decoded_at_once(name, width, height, frames, expected):
    backbone = find_backbone(name)
    shape = backbone.geometry.latent_shape(width, height, backbone.geometry.num_frames(frames))
    assert backbone.frames_at_once(torch.empty(1, *shape, device="meta")) == expected


def test_each_convolution_of_a_chunk_sees_no_more_than_the_chunk_and_its_past(vaes):
    _, ours = vaes
    longest = []
    modules = [module for module in ours.modules() if isinstance(module, WanCausalConv3d)]
    hooks = [
        module.register_forward_pre_hook(lambda module, args: longest.append(args[0].shape[2])) for module in modules
    ]
    for frames in (17, 25):
        longest.clear()
        encode(ours, clip(frames), 2)
        decode(ours, latents(ours, latents_of(frames)), 2)
        # The convolution that halves the time is given its past with its input.
        assert max(longest) == 9
    for hook in hooks:
        hook.remove()
