"""HunyuanVideo's transformer with one level for each frame, against diffusers' class and a slow one made of its parts."""

import json
import subprocess
import sys

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pusa.backbones.base import find_backbone
from pusa.backbones.context import Context
from pusa.backbones.dry_run import FusedAttention, PeakMemory
from pusa.backbones.hunyuan_video import FAMILY, transformer as module
from pusa.backbones.hunyuan_video.settings import TransformerSettings
from pusa.backbones.hunyuan_video.transformer import PusaHunyuanVideoTransformer3DModel
from pusa.backbones.settings import check_settings
from pusa.errors import ConditionError, WeightsError
from pusa.finetune.trainable import is_lora, set_trainable, trainable_names
from pusa.manifest.training import Lora, Partial
from tests.helpers.small_hunyuan import (
    TRANSFORMER,
    frame_levels,
    hunyuan_inputs,
    new_hunyuan_transformer,
)

T_B = torch.tensor([100.0, 500.0, 900.0])
EACH = 2 * 3  # tokens in a frame


def vectorized(base):
    """Return a Pusa transformer with the weights of a base model."""
    pusa = PusaHunyuanVideoTransformer3DModel(**{**base.config, "image_condition_type": None}).eval()
    pusa.load_state_dict(base.state_dict())
    return pusa


@pytest.fixture
def networks():
    """Return a small HunyuanVideo of diffusers and a Pusa transformer with the same random weights."""
    base = new_hunyuan_transformer()
    return base, vectorized(base)


@torch.no_grad()
def run(model, timestep, **given):
    return model(timestep=timestep, **given).sample


def equal_levels(t_B=T_B, frames=4):
    return t_B[:, None].repeat(1, frames)


def reference(base, timestep, hidden_states, encoder_hidden_states, encoder_attention_mask, **rest):
    """Compute frame by frame, and sample by sample, with the base's own modules and processors.

    What modulates frames is called once for each frame, with that frame's vector; what modulates the text has the mean
    of the vectors. The text is cut to its valid tokens, and nothing is masked.
    """
    samples = []
    for i, mask in enumerate(encoder_attention_mask):
        z, t_F, text = hidden_states[i : i + 1], timestep[i], encoder_hidden_states[i : i + 1, mask]
        pooled, guidance = rest["pooled_projections"][i : i + 1], rest["guidance"][i : i + 1]
        cs = [base.time_text_embed(t[None], pooled, guidance)[0] for t in t_F]
        mean = torch.stack(cs).mean(0)
        x, y = base.x_embedder(z), base.context_embedder(text, t_F.mean()[None])
        rope = base.rope(z)
        for block in base.transformer_blocks:
            normed = [block.norm1(frame, emb=c) for frame, c in zip(x.split(EACH, 1), cs, strict=True)]
            text = block.norm1_context(y, emb=mean)
            a, b = block.attn(torch.cat([n[0] for n in normed], 1), text[0], image_rotary_emb=rope)
            x = torch.cat([
                add_mlp(block.norm2, block.ff, *parts, *rest)
                for *parts, (_, *rest) in zip(x.split(EACH, 1), a.split(EACH, 1), normed, strict=True)
            ], 1)  # fmt: skip
            y = add_mlp(block.norm2_context, block.ff_context, y, b, *text[1:])
        for block in base.single_transformer_blocks:
            normed = [block.norm(frame, emb=c) for frame, c in zip(x.split(EACH, 1), cs, strict=True)]
            text, text_gate = block.norm(y, emb=mean)
            video = torch.cat([n[0] for n in normed], 1)
            a, b = block.attn(video, text, image_rotary_emb=rope)
            a, b = (block.proj_out(torch.cat([o, block.act_mlp(block.proj_mlp(n))], 2)) for o, n in ((a, video), (b, text)))
            gated = [gate[:, None] * frame for (_, gate), frame in zip(normed, a.split(EACH, 1), strict=True)]
            x, y = x + torch.cat(gated, 1), y + text_gate[:, None] * b
        x = torch.cat([base.norm_out(frame, c) for frame, c in zip(x.split(EACH, 1), cs, strict=True)], 1)
        x = base.proj_out(x).unflatten(-1, (16, 2, 2)).unflatten(1, (len(t_F), 2, 3))
        samples.append(x.permute(0, 4, 1, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4))
    return torch.cat(samples)


def add_mlp(norm, mlp, x, attended, gate_msa, shift_mlp, scale_mlp, gate_mlp):
    x = x + gate_msa[:, None] * attended
    return x + gate_mlp[:, None] * mlp(norm(x) * (1 + scale_mlp[:, None]) + shift_mlp[:, None])


@pytest.mark.parametrize("guidance_embeds", [True, False])
def test_equal_levels_are_the_base_model(guidance_embeds):
    base = new_hunyuan_transformer(guidance_embeds=guidance_embeds)
    pusa, given = vectorized(base), hunyuan_inputs()
    expected = run(base, T_B, **given)
    assert expected.std() > 0.1
    torch.testing.assert_close(run(pusa, T_B, **given), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(run(pusa, equal_levels(), **given), expected, atol=1e-5, rtol=0)
    more = run(pusa, T_B, **{**given, "guidance": given["guidance"] + 2000})
    assert torch.equal(more, run(pusa, T_B, **given)) != guidance_embeds


def test_bf16_is_as_near_to_fp32_as_the_base_model(networks):
    base, pusa = networks
    expected = run(base, T_B, **hunyuan_inputs())
    given = {name: v.bfloat16() if v.is_floating_point() else v for name, v in hunyuan_inputs().items()}
    theirs, ours = run(base.bfloat16(), T_B, **given), run(pusa.bfloat16(), equal_levels(), **given)
    assert ours.dtype == torch.bfloat16
    error, of_base = ((out.float() - expected).abs().mean() for out in (ours, theirs))
    assert error < 1.2 * of_base < 0.1 * expected.abs().mean()


def test_unequal_levels_are_those_of_the_slow_reference(networks):
    base, pusa = networks
    given, t_BF = hunyuan_inputs(), frame_levels()
    torch.testing.assert_close(reference(base, equal_levels(), **given), base(timestep=T_B, **given).sample, atol=1e-5, rtol=0)  # fmt: skip
    expected = reference(base, t_BF, **given)
    torch.testing.assert_close(run(pusa, t_BF, **given), expected.detach(), atol=1e-5, rtol=0)
    assert (run(pusa, t_BF.mean(1), **given) - expected).abs().max() > 0.1  # so the levels matter
    expected.square().mean().backward()
    theirs = {name: weight.grad for name, weight in base.named_parameters()}
    assert max(gradient.abs().max() for gradient in theirs.values()) > 0.1
    assert furthest(gradients(pusa, t_BF, **given), theirs) < 1e-5


def test_the_bases_own_two_levels_are_a_case_of_it():
    """With `token_replace` the base gives latent frame 0 timestep 0, and everything else the timestep t.

    Its text, refiner and output norm have t too, where Pusa has the mean or the frame's own: so the blocks of this
    class are run here with the base's choice of vectors. Frame 0's has no guidance term, hence a model without.
    """
    base = new_hunyuan_transformer(guidance_embeds=False, image_condition_type="token_replace")
    pusa, given = vectorized(base), hunyuan_inputs((8, 8, 8))
    expected = run(base, T_B, **given)
    t_BF = equal_levels()
    t_BF[:, 0] = 0
    with torch.no_grad():
        c_BFD = pusa._embed_conditions(t_BF, given["pooled_projections"], None)
        c_BD, lengths, frames = c_BFD[:, 1], (8, 8, 8), t_BF.shape[1]
        x = pusa.x_embedder(given["hidden_states"])
        y = pusa._refine(given["encoder_hidden_states"], T_B, lengths)
        rope = pusa._rotary(given["hidden_states"]).flatten(0, 1)
        for block in pusa.blocks:
            x, y = block(x, y, c_BFD, c_BD, lengths, [frames * EACH], rope)
        x = pusa.proj_out(pusa.norm_out(x, c_BD)).view(3, frames, 2, 3, 16, 2, 2)
    ours = x.permute(0, 4, 1, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    assert (run(pusa, T_B, **given) - expected).abs().max() > 0.1  # so the second level matters


def test_each_frame_has_its_own_level(networks):
    _, pusa = networks
    changed = equal_levels()
    changed[:, 2] += 400
    effect = run(pusa, changed, **hunyuan_inputs()) - run(pusa, equal_levels(), **hunyuan_inputs())
    effect_F = effect.abs().mean((0, 1, 3, 4))
    assert effect_F.argmax() == 2
    assert effect_F[2] > 1.5 * effect_F[[0, 1, 3]].max()


def test_a_sample_does_not_depend_on_the_others_in_its_batch(networks):
    _, pusa = networks
    given, t_BF = hunyuan_inputs((5, 8, 0, 2, 2)), frame_levels(5)
    given["encoder_attention_mask"][3] = given["encoder_attention_mask"][3].roll(4)
    together = run(pusa, t_BF, **given)
    for i in range(5):
        alone = run(pusa, t_BF[i : i + 1], **{name: value[i : i + 1] for name, value in given.items()})
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=0)


def test_padding_of_the_text_changes_nothing_and_may_lie_anywhere(networks):
    base, pusa = networks
    given = hunyuan_inputs()
    expected = run(pusa, frame_levels(), **given)
    mask = given["encoder_attention_mask"]
    given["encoder_hidden_states"] = torch.where(mask[..., None], given["encoder_hidden_states"], 100.0)
    torch.testing.assert_close(run(pusa, frame_levels(), **given), expected, atol=1e-5, rtol=0)
    for name in ("encoder_hidden_states", "encoder_attention_mask"):
        given[name] = given[name].roll(3, dims=1)
    torch.testing.assert_close(run(pusa, frame_levels(), **given), expected, atol=1e-5, rtol=0)
    assert (run(base, T_B, **given) - run(pusa, T_B, **given)).abs().max() > 1e-3  # the base takes the first tokens


@pytest.mark.parametrize("lengths", [(0, 0, 0), (5, 0, 2)])
def test_a_text_without_valid_tokens_gives_finite_numbers_where_the_base_gives_none(networks, lengths):
    base, pusa = networks
    given = hunyuan_inputs(lengths)
    is_empty = torch.tensor(lengths) == 0
    assert run(base, T_B, **given)[is_empty].isnan().all()
    ours = run(pusa, frame_levels(), **given)
    assert ours.isfinite().all()
    given["encoder_hidden_states"] = given["encoder_hidden_states"] + 10 * is_empty[:, None, None]
    assert torch.equal(run(pusa, frame_levels(), **given), ours)
    found = gradients(pusa, frame_levels(), **given)
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert found["x_embedder.proj.weight"].abs().max() > 0.01


def gradients(model, timestep, **given):
    model.zero_grad()
    model(timestep=timestep, **given).sample.square().mean().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


def furthest(ours, theirs):
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in theirs)


def test_gradients_at_equal_levels_are_those_of_the_base_model(networks):
    base, pusa = networks
    expected = gradients(base, T_B, **hunyuan_inputs())
    assert min(gradient.abs().max() for gradient in expected.values()) > 0  # so every weight counts
    assert furthest(gradients(pusa, equal_levels(), **hunyuan_inputs()), expected) < 1e-5


class Shapes(TorchDispatchMode):
    """Record the size of every tensor that is made while this mode is on."""

    def __init__(self):
        super().__init__()
        self.sizes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.sizes |= {leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
        return result


@pytest.mark.parametrize("trained", [False, True])
def test_no_modulation_is_expanded_over_the_tokens(networks, trained):
    with Shapes() as shapes, torch.set_grad_enabled(trained):
        sample = networks[1](timestep=frame_levels(), **hunyuan_inputs()).sample
        if trained:
            sample.square().mean().backward()
    tokens, width = 3 * 4 * EACH, 16
    assert tokens * width in shapes.sizes and 3 * 4 * 6 * width in shapes.sizes
    assert not {tokens * 6 * width, tokens * 3 * width} & shapes.sizes


@pytest.mark.parametrize("every", [1, 2])
def test_gradient_checkpointing_changes_nothing_and_counts_blocks_of_both_kinds(networks, every):
    _, pusa = networks
    plain = gradients(pusa, frame_levels(), **hunyuan_inputs())
    pusa.enable_gradient_checkpointing()
    pusa.checkpoint_every_nth_block = every
    calls = [0] * len(pusa.blocks)
    for index, block in enumerate(pusa.blocks):
        block.register_forward_pre_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    assert furthest(gradients(pusa.train(), frame_levels(), **hunyuan_inputs()), plain) == 0
    assert calls == {1: [2, 2, 2, 2, 2], 2: [2, 1, 2, 1, 2]}[every]  # twice: once more for the backward pass


def test_diffusers_attention_backends_are_used(networks, monkeypatch):
    base, pusa = networks
    expected = run(base, T_B, **hunyuan_inputs())
    used = []

    def recorded(*args, backend, **kwargs):
        used.append(backend and backend.value)
        return dispatch_attention_fn(*args, backend=backend, **kwargs)

    monkeypatch.setattr(module, "dispatch_attention_fn", recorded)
    try:
        pusa.set_attention_backend("_native_math")
        torch.testing.assert_close(run(pusa, T_B, **hunyuan_inputs()), expected, atol=1e-5, rtol=0)
        assert used == ["_native_math"] * 5 * 3  # blocks, and texts of different lengths
    finally:
        pusa.set_attention_backend("native")  # diffusers keeps the last one for the whole process, too


def method(**settings):
    return Lora(method="lora", rank=2, targets=FAMILY.recipe.lora_targets, **settings)


def test_a_new_lora_of_the_familys_targets_changes_nothing_and_can_be_trained(networks):
    _, pusa = networks
    given = {"timestep": frame_levels(), **hunyuan_inputs()}
    expected = run(pusa, **given)
    set_trainable(pusa, method())
    for name, weight in pusa.named_parameters():
        if is_lora(name):
            torch.nn.init.normal_(weight.data, std=0.0 if "lora_B" in name else 1.0)
    assert torch.equal(run(pusa, **given), expected)
    pusa(**given).sample.square().mean().backward()
    trained = {name for name, weight in pusa.named_parameters() if weight.grad is not None}
    assert len(trained) == 2 * (2 * 12 + 3 * 5) and all(map(is_lora, trained))
    assert all(weight.grad.abs().max() > 0 for name, weight in pusa.named_parameters() if "lora_B" in name)
    for weight in (w for name, w in pusa.named_parameters() if "lora_B" in name):
        torch.nn.init.normal_(weight.data, std=0.5)
    changed = run(pusa, **given)
    assert (changed - expected).abs().max() > 0.01
    for scale, same_as in ((0.0, expected), (1.0, changed)):
        torch.testing.assert_close(run(pusa, attention_kwargs={"scale": scale}, **given), same_as)
    pusa.disable_adapters()
    assert torch.equal(run(pusa, **given), expected)


def test_the_familys_targets_are_attention_and_mlp_of_the_repeated_blocks(networks):
    """Neither the refiner's layers nor the last projection, whose names have the same ends."""
    _, pusa = networks
    double = [f"attn.{name}" for name in ("to_q", "to_k", "to_v", "add_k_proj", "add_v_proj", "add_q_proj")]
    double += ["attn.to_out.0", "attn.to_add_out"]
    double += [f"{stream}.net.{layer}" for stream in ("ff", "ff_context") for layer in ("0.proj", "2")]
    single = ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out"]
    expected = [f"transformer_blocks.{i}.{name}" for i in range(2) for name in double]
    expected += [f"single_transformer_blocks.{i}.{name}" for i in range(3) for name in single]
    assert sorted(trainable_names(pusa, method())) == sorted(expected)


def test_weights_of_either_kind_of_block_can_be_named(networks):
    _, pusa = networks
    names = ("transformer_blocks.1.norm1.linear.*", "single_transformer_blocks.[02].proj_out.bias")
    assert trainable_names(pusa, Partial(method="partial", names=names)) == [
        "transformer_blocks.1.norm1.linear.weight",
        "transformer_blocks.1.norm1.linear.bias",
        "single_transformer_blocks.0.proj_out.bias",
        "single_transformer_blocks.2.proj_out.bias",
    ]


@pytest.mark.slow
def test_a_compiled_transformer_computes_the_same(networks):
    _, pusa = networks
    expected = run(pusa, frame_levels(), **hunyuan_inputs())
    theirs = gradients(pusa, frame_levels(), **hunyuan_inputs())
    for block in pusa.blocks:
        block.compile(dynamic=True)
    torch.testing.assert_close(run(pusa, frame_levels(), **hunyuan_inputs()), expected, atol=1e-5, rtol=0)
    assert furthest(gradients(pusa, frame_levels(), **hunyuan_inputs()), theirs) < 1e-5
    torch.testing.assert_close(run(torch.compile(pusa), frame_levels(), **hunyuan_inputs()), expected, atol=1e-5, rtol=0)  # fmt: skip
