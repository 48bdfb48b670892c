"""Training the parts of a tiny model: the phases of a VAE, and Muon for some of the weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pusa.backbones.tiny_recipe import VaePhase, find_tiny_recipe
from pusa.tiny.shapes import draw, scenes
from pusa.tiny.training import CaptionedLatents, Optimizers, new_tokenizer, train_base, train_vae

RECIPE = find_tiny_recipe("hunyuan_video")
FRAMES = 5


@pytest.fixture(scope="module")
def clips():
    """Return four drawn clips of 5 frames."""
    return np.stack([draw(scene, size=32, num_frames=FRAMES) for scene in scenes(0, 4)])


class Watched(torch.nn.Module):
    """A VAE that notes the shapes and dtypes that it encodes and decodes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.vae, self.encoded, self.decoded = RECIPE.new_vae(None), [], []
        self.encoder = self.vae.encoder

    def encode(self, x_BCTHW):
        made = self.vae.encode(x_BCTHW)
        self.encoded.append((x_BCTHW.shape[0], x_BCTHW.shape[2], made.latent_dist.mean.dtype))
        return made

    def decode(self, z_BCFhw):
        self.decoded.append(z_BCFhw.detach().clone())
        return self.vae.decode(z_BCFhw)


def changed(before, module):
    """Return the parts of a module whose weights are no longer those of a state dict."""
    return {name.split(".")[0] for name, weight in module.state_dict().items() if not torch.equal(weight, before[name])}


def copy_of(module):
    return {name: weight.clone() for name, weight in module.state_dict().items()}


def test_batches_of_a_phase_take_turns_and_are_windows_or_whole_clips(clips):
    watched = Watched()
    scores = []
    phase = VaePhase(((2, 1), (1, None), (3, 1)), learning_rate=1e-3)
    train_vae(RECIPE, watched, clips, phase, steps=4, on_step=lambda step, psnr: scores.append((step, psnr)))
    assert [(count, frames) for count, frames, _ in watched.encoded] == [(2, 1), (1, FRAMES), (3, 1), (2, 1)]
    assert {dtype for *_, dtype in watched.encoded} == {torch.float32}
    assert [step for step, _ in scores] == [0, 1, 2, 3] and all(0 < psnr < 60 for _, psnr in scores)


def test_autocast_computes_in_bfloat16_and_leaves_the_weights_in_float32(clips):
    watched = Watched()
    before = copy_of(watched.vae)
    train_vae(RECIPE, watched, clips, VaePhase(((1, 1),), matrix_learning_rate=1e-2, autocast=True), steps=1)
    assert watched.encoded[0][2] is torch.bfloat16
    assert {weight.dtype for weight in watched.vae.parameters()} == {torch.float32}
    assert changed(before, watched.vae) == {"encoder", "decoder", "quant_conv", "post_quant_conv"}


def test_the_decoder_alone_learns_from_noised_latents_and_the_encoder_can_be_trained_again(clips):
    seen = []
    for noise in (0.0, 0.5):
        watched = Watched()
        before = copy_of(watched.vae)
        train_vae(RECIPE, watched, clips, VaePhase(((2, 1),), decoder_only=True, noise=noise), steps=1)
        assert changed(before, watched.vae) == {"decoder", "post_quant_conv"}
        assert all(weight.requires_grad for weight in watched.vae.parameters())
        seen.append(watched.decoded[0])
    assert (seen[1] - seen[0]).std().item() == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize("rate", [None, 0.1])
def test_muon_takes_the_chosen_matrices_only_if_it_has_a_rate(rate):
    torch.manual_seed(0)
    chosen, other = (torch.nn.Parameter(torch.randn(4, 4)) for _ in range(2))
    before = chosen.detach().clone(), other.detach().clone()
    optimizers = Optimizers([chosen, other], [chosen], rate, lambda step: 1 / (1 + step), lr=1e-3, weight_decay=0.0)
    (chosen.square().sum() + other.square().sum()).backward()
    optimizers.step()
    steps = [(weight.detach() - start).norm().item() for weight, start in zip((chosen, other), before, strict=True)]
    # AdamW's first step is its rate in every element. Muon's has singular values near rate * 0.2 * sqrt(4).
    assert steps[1] == pytest.approx(4 * 1e-3, rel=1e-3)
    assert steps[0] == (pytest.approx(0.04 * 2, rel=0.2) if rate else pytest.approx(4 * 1e-3, rel=1e-3))
    assert chosen.grad is None and other.grad is None
    assert [group["lr"] for group in optimizers.optimizers[0].param_groups] == [5e-4]


@pytest.mark.parametrize("rate", [None, 1e-12])
def test_a_rate_of_their_own_is_for_the_matrices_of_the_blocks_alone(rate):
    recipe = replace(RECIPE, base_matrix_learning_rate=rate)
    torch.manual_seed(0)
    tokenizer = new_tokenizer(recipe.max_tokens["tokenizer"])
    encoders = {part: build(len(tokenizer)) for part, build in recipe.new_text_encoders.items()}
    transformer = recipe.new_transformer()
    before, losses = copy_of(transformer), []
    clips = CaptionedLatents(torch.randn(4, 16, 2, 4, 4), [scene.caption for scene in scenes(0, 4)])
    train_base(
        recipe, transformer, encoders, tokenizer, clips, steps=4, batch_size=4, learning_rate=1.5e-3,
        on_step=lambda step, loss: losses.append(loss),
    )  # fmt: skip
    assert len(losses) == 4 and np.isfinite(losses).all()
    moved = {name: (weight - before[name]).abs().max().item() for name, weight in transformer.named_parameters()}
    matrices = {name for name, weight in transformer.named_parameters() if weight.ndim == 2 and "blocks." in name}
    still = {name for name, most in moved.items() if most < 1e-6}
    assert len(matrices) > 20
    assert still == (matrices if rate else set())
