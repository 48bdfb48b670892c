"""HunyuanVideo's transformer with one level for each frame, against diffusers' class, whole or frame by frame."""

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn

from pusa.backbones.hunyuan_video import FAMILY
from pusa.backbones.hunyuan_video.settings import TransformerSettings
from pusa.backbones.hunyuan_video.transformer import PusaHunyuanVideoTransformer3DModel
from pusa.backbones.settings import check_settings
from pusa.errors import WeightsError
from tests.helpers.small_hunyuan import (
    EACH,
    T_B,
    TRANSFORMER,
    equal_levels,
    frame_levels,
    furthest,
    gradients,
    hunyuan_inputs,
    new_hunyuan_transformer,
    run,
    vectorized,
)


@pytest.fixture
def networks():
    """Return a small HunyuanVideo of diffusers and a Pusa transformer with the same random weights."""
    base = new_hunyuan_transformer()
    return base, vectorized(base)


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
            a, b = (
                block.proj_out(torch.cat([o, block.act_mlp(block.proj_mlp(n))], 2)) for o, n in ((a, video), (b, text))
            )
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
    same = reference(base, equal_levels(), **given).detach()
    torch.testing.assert_close(same, run(base, T_B, **given), atol=1e-5, rtol=0)
    expected = reference(base, t_BF, **given)
    torch.testing.assert_close(run(pusa, t_BF, **given), expected.detach(), atol=1e-5, rtol=0)
    assert (run(pusa, t_BF.mean(1), **given) - expected).abs().max() > 0.1  # so the levels matter
    expected.square().mean().backward()
    theirs = {name: weight.grad for name, weight in base.named_parameters()}
    assert max(gradient.abs().max() for gradient in theirs.values()) > 0.1
    assert furthest(gradients(pusa, t_BF, **given), theirs) < 1e-6


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


def test_diffusers_attention_backends_are_used(networks, monkeypatch):
    base, pusa = networks
    expected = run(base, T_B, **hunyuan_inputs())
    used = []

    def recorded(*args, backend, **kwargs):
        used.append(backend and backend.value)
        return dispatch_attention_fn(*args, backend=backend, **kwargs)

    monkeypatch.setattr("pusa.backbones.joint_attention.dispatch_attention_fn", recorded)
    try:
        pusa.set_attention_backend("_native_math")
        torch.testing.assert_close(run(pusa, T_B, **hunyuan_inputs()), expected, atol=1e-5, rtol=0)
        assert used == ["_native_math"] * 5 * 3  # blocks, and texts of different lengths
    finally:
        pusa.set_attention_backend("native")  # diffusers keeps the last one for the whole process, too


def test_files_are_those_of_the_base_class(networks, tmp_path):
    base, pusa = networks
    base.save_pretrained(tmp_path / "base")
    pusa.save_pretrained(tmp_path / "pusa")
    for folder, cls in (("base", PusaHunyuanVideoTransformer3DModel), ("pusa", HunyuanVideoTransformer3DModel)):
        loaded = cls.from_pretrained(tmp_path / folder)
        expected = base if cls is HunyuanVideoTransformer3DModel else pusa
        theirs = run(expected, T_B, **hunyuan_inputs())
        torch.testing.assert_close(run(loaded, T_B, **hunyuan_inputs()), theirs, atol=1e-5, rtol=0)


def test_the_published_size_has_the_names_and_shapes_of_the_base_class():
    with torch.device("meta"):
        models = [cls() for cls in (HunyuanVideoTransformer3DModel, PusaHunyuanVideoTransformer3DModel)]
    base, pusa = ({name: weight.shape for name, weight in model.state_dict().items()} for model in models)
    assert base == pusa
    assert dict(models[0].config) == dict(models[1].config)
    assert sum(shape.numel() for shape in pusa.values()) == FAMILY.sizes["13B"]
    assert not list(models[1].buffers())


@pytest.mark.parametrize("shape", [(3, 3), (2,), (3, 4, 1), (3, 4 * EACH)])
def test_a_timestep_of_another_shape_is_refused(networks, shape):
    with pytest.raises(ValueError, match=r"allowed are \(3,\) and \(3, 4\)"):
        run(networks[1], torch.ones(shape), **hunyuan_inputs())


def test_a_model_distilled_with_guidance_must_be_given_the_number(networks):
    with pytest.raises(ValueError, match="guidance is None"):
        run(networks[1], T_B, **{**hunyuan_inputs(), "guidance": None})


@pytest.mark.parametrize(
    "changes",
    [{"image_condition_type": "token_replace"}, {"image_condition_type": "latent_concat"}, {"patch_size_t": 2}],
)
def test_a_model_that_would_compute_another_function_is_refused(changes):
    with pytest.raises(ValueError, match="allowed is"):
        PusaHunyuanVideoTransformer3DModel(**{**TRANSFORMER, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"image_condition_type": "token_replace"},
            "'token_replace'; these are weights for image-to-video; Pusa needs",
        ),
        (
            {"image_condition_type": "latent_concat", "in_channels": 33},
            "'latent_concat'; these are weights for image-to",
        ),
        ({"image_condition_type": "x" * 10**5}, "these are weights for image-to-video"),
        (
            {"in_channels": 33},
            "in_channels is 33; expected 16, as the VAE's latents have; these are weights for image-to",
        ),
        ({"out_channels": 32}, "out_channels is 32; expected 16"),
        ({"patch_size": 1}, "patch_size is 1; expected 2"),
        ({"patch_size_t": 2}, "patch_size_t is 2; expected 1"),
        ({"rope_axes_dim": [16, 56, 58]}, "the sum of rope_axes_dim is 130; expected 128"),
        ({"rope_axes_dim": [16, 56]}, "rope_axes_dim"),
        ({"rope_axes_dim": [15, 57, 56]}, "rope_axes_dim.*15"),
        ({"num_layers": 10**9}, "num_layers.*1000000000"),
        ({"num_attention_heads": 0}, "num_attention_heads.*0"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio"),
        ({"mlp_ratio": 1e9}, "mlp_ratio"),
        ({"guidance_embeds": "yes"}, "guidance_embeds.*yes"),
        ({"qk_norm": "layer_norm"}, "qk_norm.*layer_norm"),
        ({"rope_theta": 0}, "rope_theta.*0"),
        ({"_class_name": "WanTransformer3DModel"}, "WanTransformer3DModel"),
    ],
)
def test_settings_that_are_not_those_of_text_to_video_are_refused_in_one_sentence(changes, message):
    with pytest.raises(WeightsError, match=message) as refused:
        check_settings(TransformerSettings, changes, "config.json")
    text = str(refused.value)
    assert "config.json" in text and "\n" not in text and len(text) < 500


@pytest.mark.parametrize("guidance_embeds", [True, False])
def test_settings_of_the_published_models_are_accepted(guidance_embeds):
    with torch.device("meta"):
        config = dict(HunyuanVideoTransformer3DModel(guidance_embeds=guidance_embeds, num_layers=1).config)
    accepted = check_settings(TransformerSettings, config, "config.json").arguments()
    assert accepted["guidance_embeds"] == guidance_embeds and accepted["num_layers"] == 1
