"""Mochi's VAE in chunks: the same results as for the whole clip, in less memory."""

import pytest
import torch
from diffusers import AutoencoderKLMochi
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXSafeConv3d
from diffusers.models.autoencoders.autoencoder_kl_mochi import FourierFeatures

from pusa.backbones.mochi.vae import PusaAutoencoderKLMochi, StreamedCausalConv3d

BLOCKS = {
    "encoder_block_out_channels": (32, 32, 64, 64),
    "decoder_block_out_channels": (32, 32, 64, 64),
    "layers_per_block": (1, 1, 1, 1, 1),
}
EXPANSIONS = {"mochi": {}, "another": {"temporal_expansions": (2, 1, 2), "spatial_expansions": (2, 1, 3)}}


def pair(**config):
    """diffusers' VAE and ours with the same random weights, those of the attention large enough to count."""
    torch.manual_seed(0)
    base = AutoencoderKLMochi(**BLOCKS, **config).eval()
    for module in base.modules():
        if isinstance(module, Attention):
            for weight in module.parameters():
                torch.nn.init.normal_(weight, std=0.2)
    ours = PusaAutoencoderKLMochi(**BLOCKS, **config).eval()
    ours.load_state_dict(base.state_dict())
    return base, ours


@pytest.fixture(scope="module", params=EXPANSIONS)
def vaes(request):
    return pair(**EXPANSIONS[request.param])


def clip(frames, height=16, width=24):
    return torch.rand(2, 3, frames, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def latents(frames, height=2, width=3):
    return torch.randn(2, 12, frames, height, width, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def encode(vae, x, at_once=None):
    vae.latent_frames_at_once = at_once
    posterior = vae.encode(x).latent_dist
    return torch.stack([posterior.mean, posterior.logvar])


@torch.no_grad()
def decode(vae, z, at_once=None):
    vae.latent_frames_at_once = at_once
    return vae.decode(z).sample


CALLS = {"encode": (encode, clip(13), clip(31)), "decode": (decode, latents(3), latents(6))}


def inputs_seen(vae, kind, call, *args):
    """Return the shapes of the inputs of all modules of this kind during a call."""
    seen = []
    modules = [module for module in vae.modules() if isinstance(module, kind)]
    hooks = [module.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape)) for module in modules]
    call(vae, *args)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("frames", [1, 7, 12, 13, 31])
def test_encoding_in_chunks_is_the_base_model(vaes, frames):
    base, ours = vaes
    expected = encode(base, clip(frames))
    assert expected.std() > 0.1
    for at_once in (1, 2, None):
        torch.testing.assert_close(encode(ours, clip(frames), at_once), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def decode_as_genmo(vae, z):
    """diffusers' decoder with genmo's rule: repetitions of the first frame are dropped after each block, not last."""
    decoder = vae.decoder
    x, _ = decoder.block_in(decoder.conv_in(z))
    for block in decoder.up_blocks:
        x = block(x)[0][:, :, block.temporal_expansion - 1 :]
    x = decoder.nonlinearity(decoder.block_out(x)[0])
    return decoder.proj_out(x.movedim(1, -1)).movedim(-1, 1)


@pytest.mark.parametrize("frames", [1, 2, 3, 6])
def test_decoding_in_chunks_is_genmos_decoding(vaes, frames):
    base, ours = vaes
    expected = decode_as_genmo(base, latents(frames))
    assert expected.std() > 0.1
    for at_once in (1, 2, None):
        torch.testing.assert_close(decode(ours, latents(frames), at_once), expected, atol=1e-5, rtol=0)


def test_diffusers_differs_only_in_the_first_frames():
    base, ours = pair()
    difference = (decode(ours, latents(6)) - decode(base, latents(6))).abs().amax((0, 1, 3, 4))
    assert difference[0] > 0.01 and difference[-1] < 1e-5


def test_the_attention_matters():
    with_attention, without = pair()
    for module in without.modules():
        if isinstance(module, Attention):
            torch.nn.init.zeros_(module.to_out[0].weight)
    difference = encode(with_attention, clip(13)) - encode(without, clip(13), 1)
    assert difference.abs().mean() > 0.05


def test_parameters_and_configuration_keep_their_names():
    base, ours = pair()
    assert list(ours.state_dict()) == list(base.state_dict())
    assert dict(ours.config) == dict(base.config)


@pytest.mark.parametrize("name", CALLS)
def test_the_inputs_of_modules_do_not_grow_with_the_clip(name):
    _, vae = pair()
    call, short, long = CALLS[name]

    def most(x, at_once):
        return max(shape.numel() for shape in inputs_seen(vae, torch.nn.Module, call, x, at_once) if shape != x.shape)

    assert most(long, 1) == most(short, 1) < most(short, None)
    assert most(long, None) > 1.8 * most(short, None)


@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("name", CALLS)
def test_convolutions_see_a_chunk_of_frames(name, at_once):
    _, vae = pair()
    call, _, long = CALLS[name]
    assert max(shape[2] for shape in inputs_seen(vae, StreamedCausalConv3d, call, long, at_once)) == 6 * at_once


def test_the_cache_of_a_chunk_does_not_keep_the_chunk_in_memory():
    _, vae = pair()
    vae.latent_frames_at_once = 1
    convolution = vae.decoder.block_in.resnets[0].conv1
    _, past = convolution(torch.randn(1, 64, 6, 2, 3))
    assert past.shape[2] == 2
    assert past.untyped_storage().nbytes() == past.numel() * past.element_size()


def test_large_inputs_are_not_cut_by_diffusers():
    """CogVideoXSafeConv3d cuts them in time as if there were no stride."""
    _, vae = pair()
    assert not [module for module in vae.modules() if isinstance(module, CogVideoXSafeConv3d)]


def test_with_tiling_it_is_the_base_model():
    base, ours = pair()
    for vae in (base, ours):
        vae.enable_tiling(16, 16, 8, 8)
    torch.testing.assert_close(
        decode(ours, latents(6), 1)[:, :, -1], decode(base, latents(6))[:, :, -1], atol=1e-5, rtol=0
    )
    torch.testing.assert_close(encode(ours, clip(13), 1), encode(base, clip(13)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("at_once", [1, 4])
@torch.no_grad()
def test_tiles_are_decoded_in_chunks_as_diffusers_decodes_them_whole(at_once):
    """Each tile remembers its own past. In space they are cut and blended alike."""
    base, ours = pair()
    base.enable_tiling(32, 32, 24, 24)
    z = latents(6, height=5, width=9)[:1]
    whole = decode(base, z)
    chunks = list(ours.decode_chunks(z, at_once, tile=32))
    assert [chunk.shape[2] for chunk in chunks] == ([1, *[6] * 5] if at_once == 1 else [19, 12])
    # diffusers differs in the first frames, and so does what has them as its past.
    torch.testing.assert_close(torch.cat(chunks, 2)[:, :, -6:], whole[:, :, -6:], atol=1e-5, rtol=0)
    untiled = torch.cat(list(ours.decode_chunks(z, at_once)), 2)
    assert (untiled - torch.cat(chunks, 2)).abs().max() > 0.01


def test_uint8_frames_become_floats_chunk_by_chunk():
    _, vae = pair()
    frames = torch.randint(0, 256, (1, 3, 31, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    floats = frames.float() / 127.5 - 1
    for at_once in (None, 2):
        assert torch.equal(encode(vae, frames, at_once), encode(vae, floats, at_once))
    seen = inputs_seen(vae, FourierFeatures, encode, frames, 2)
    assert [shape[2] for shape in seen] == [7, 12, 12]
    vae.enable_tiling(16, 16, 8, 8)
    assert {shape[2] for shape in inputs_seen(vae, FourierFeatures, encode, frames, 2)} == {7, 12}


def test_a_model_folder_loads_and_saves(root, tmp_path):
    folder = root / "pusa/builtin/tiny/vae"
    base, ours = AutoencoderKLMochi.from_pretrained(folder), PusaAutoencoderKLMochi.from_pretrained(folder)
    ours.save_pretrained(tmp_path)
    again = PusaAutoencoderKLMochi.from_pretrained(tmp_path)
    for vae in (ours, again):
        for at_once in (1, None):
            expected = decode_as_genmo(base, latents(6))
            torch.testing.assert_close(decode(vae, latents(6), at_once), expected, atol=1e-5, rtol=0)
            torch.testing.assert_close(encode(vae, clip(31), at_once), encode(base, clip(31)), atol=1e-5, rtol=0)


def test_less_than_one_latent_frame_at_once_is_refused():
    with pytest.raises(ValueError, match="expected None, or 1 or more"):
        pair()[1].latent_frames_at_once = 0
