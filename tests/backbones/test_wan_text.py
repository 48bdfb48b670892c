"""Wan's text features and clock, and the ranges of the settings of its parts."""

import json
import logging
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from pusa.backbones.base import find_backbone
from pusa.backbones.settings import check_settings
from pusa.backbones.wan.backbone import Wan, clean_prompt
from pusa.backbones.wan.transformer import PusaWanTransformer3DModel
from pusa.diffusion.sampler import TextFeatures
from pusa.errors import WeightsError
from pusa.manifest.models import ModelSpec
from pusa.precompute.encode import text_rows
from pusa.weights.model import Model
from tests.helpers.small_wan import TEXT_WIDTH, TRANSFORMER, VAE, VAE_5B, new_wan_transformer, write_wan_2_1

PROMPTS = [
    "a red circle",
    "",
    "  a   blue\n square\t",
    "schÃ¶n &amp;amp; &lt;b&gt; â€œquotedâ€\x9d",
    "\ufb01ne\u3000wide \uff21\uff22\uff23",
    "a red circle moves right " * 200,  # more than 512 tokens
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_wan_2_1(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def model(folder):
    return Model(ModelSpec(backbone="wan2.1", weights=str(folder)))


@pytest.fixture(scope="module")
def published(folder):
    """diffusers' pipeline with the same text encoder, as far as it encodes prompts."""
    encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder").eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    pipeline = SimpleNamespace(text_encoder=encoder, tokenizer=tokenizer, _execution_device=torch.device("cpu"))
    return lambda prompts: WanPipeline._get_t5_prompt_embeds(pipeline, list(prompts), max_sequence_length=512)


@torch.no_grad()
def test_features_are_those_of_diffusers_pipeline(model, published):
    text = model.encode_text(PROMPTS)
    assert text.features.shape == (len(PROMPTS), 512, TEXT_WIDTH)
    torch.testing.assert_close(text.features, published(PROMPTS), atol=1e-5, rtol=0)
    assert text.features.std() > 0.1
    assert not text.features[~text.mask].any()


def test_without_padding_the_valid_features_are_the_same(model):
    short = PROMPTS[:5]
    padded, cut = model.encode_text(short), model.encode_text(short, padded=False)
    length = cut.features.shape[1]
    assert length == int(padded.mask.sum(1).max()) < 512
    assert torch.equal(cut.mask, padded.mask[:, :length])
    torch.testing.assert_close(cut.features, padded.features[:, :length], atol=1e-5, rtol=0)


def test_an_empty_prompt_has_one_valid_token_and_a_dropped_one_none(model):
    text = model.encode_text(["", " \n", "&nbsp;", "a red circle"])
    assert text.mask.sum(1).tolist()[:3] == [1, 1, 1]
    assert torch.equal(text.features[0], text.features[1]) and torch.equal(text.features[0], text.features[2])
    dropped = model.backbone.drop_text(text, torch.tensor([True, True, True, False]), model.encode_text([""]))
    assert dropped.features.shape == text.features.shape
    assert not dropped.features[3].any() and not dropped.mask[3].any() and dropped.pooled is None
    pooled = replace(text, pooled=torch.ones(4, 3))
    dropped = model.backbone.drop_text(pooled, torch.tensor([True, False, True, False]), pooled[:1])
    assert dropped.pooled.sum(1).tolist() == [3, 0, 3, 0]
    assert text.features[0].any()


def test_features_that_are_not_finite_do_not_spread_to_the_zeros(model):
    parts = dict(model.text_parts)
    encoder = parts["text_encoder"]
    parts["text_encoder"] = broken = type(encoder)(encoder.config).eval()
    torch.nn.init.constant_(broken.encoder.final_layer_norm.weight, float("nan"))
    text = model.backbone.encode_text(parts, ["a red circle"])
    assert text.features[text.mask].isnan().all() and not text.features[~text.mask].any()


def test_a_long_prompt_is_cut_with_a_warning(model, caplog):
    with caplog.at_level(logging.WARNING):
        text = model.encode_text([PROMPTS[-1]])
    assert text.mask.all()
    assert "cut to the first 512 of its 1001 tokens" in caplog.text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  a \n\t b  ", "a b"),
        ("&amp;lt;b&amp;gt;", "<b>"),
        ("schÃ¶n", "schön"),
        ("", ""),
        ("&nbsp; ", ""),
        ("\u2018curly\u2019 \ufb01ne", "'curly' fine"),
        ("a\x00b\x1b[31m", "ab"),
        ("红色的圆 ﾊﾝｶｸ", "红色的圆 ハンカク"),
    ],
)
def test_prompts_are_cleaned(text, expected):
    assert clean_prompt(text) == prompt_clean(text) == expected


def test_tables_store_valid_rows_and_the_length_that_they_are_padded_to(model):
    """The row of the empty prompt has all rows: `text_tokens` of a table is their number."""
    captions = {"k0": "", "k1": "a red circle", "k2": "a blue square"}
    rows = {row["text_key"]: row for row in text_rows(captions, model, 2, "float32", "raw")}
    assert rows["k0"]["text_shape"] == [512, TEXT_WIDTH] and rows["k0"]["tokens"] == 1
    for key in ("k1", "k2"):
        assert rows[key]["text_shape"] == [rows[key]["tokens"], TEXT_WIDTH]
        stored = torch.frombuffer(bytearray(rows[key]["text"]), dtype=torch.float32).view(rows[key]["text_shape"])
        padded = torch.cat([stored, torch.zeros(512 - len(stored), TEXT_WIDTH)])
        torch.testing.assert_close(padded, model.encode_text([captions[key]]).features[0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_zero_rows_are_attended_to(model):
    """So their number is part of the function, and which rows are called valid is not."""
    transformer, backbone = model.transformer, model.backbone
    z, sigma = torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([[0.1, 0.5, 1]])
    padded, cut = model.encode_text(PROMPTS[:1]), model.encode_text(PROMPTS[:1], padded=False)
    velocity = backbone.predict(transformer, z, sigma, padded)
    assert (backbone.predict(transformer, z, sigma, cut) - velocity).abs().max() > 1e-3
    all_valid = TextFeatures(padded.features, torch.ones_like(padded.mask))
    assert torch.equal(backbone.predict(transformer, z, sigma, all_valid), velocity)
    zeros = torch.zeros(1, 512 - cut.features.shape[1], TEXT_WIDTH)
    extended = TextFeatures(torch.cat([cut.features, zeros], 1), padded.mask)
    torch.testing.assert_close(backbone.predict(transformer, z, sigma, extended), velocity, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_velocity_and_the_clock_are_those_of_diffusers(model):
    base = new_wan_transformer(0)
    z, text = torch.randn(2, 16, 3, 4, 4, generator=torch.Generator().manual_seed(0)), model.encode_text(PROMPTS[:2])
    ours = PusaWanTransformer3DModel(**TRANSFORMER).eval()
    ours.load_state_dict(base.state_dict())
    sigma_B = torch.tensor([0.25, 0.875])
    expected = -base(z, 1000 * sigma_B, text.features).sample
    found = model.backbone.predict(ours, z, sigma_B[:, None].expand(2, 3), text)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.1 and found.dtype == torch.float32


def test_a_bf16_clip_does_not_round_the_clock(model):
    """In bf16, levels above 0.512 would move in steps of 4 of 1000 timesteps."""
    seen = []

    def transformer(**given):
        seen.append(given["timestep"])
        return (given["hidden_states"],)

    sigma = torch.tensor([[0.7213, 0.9371]])
    text = TextFeatures(torch.zeros(1, 1, 1), torch.ones(1, 1, dtype=torch.bool))
    model.backbone.predict(transformer, torch.zeros(1, 16, 2, 2, 2, dtype=torch.bfloat16), sigma, text)
    assert torch.equal(seen[0], 1000 * sigma)


def test_a_fine_tune_that_records_no_latent_space_is_taken_for_normalised(folder, tmp_path):
    """As published ones: for Mochi there are two, and one must be named."""
    shutil.copytree(folder / "transformer", tmp_path / "fine_tune")
    assert (
        Model(ModelSpec(backbone="wan2.1", weights=str(folder), checkpoint=str(tmp_path / "fine_tune"))).space_name
        == "dit"
    )


def test_the_longest_text_has_the_length_and_width_of_features(model):
    longest = model.backbone.longest_text(model.transformer, 2)
    assert longest.features.shape == (2, 512, TEXT_WIDTH) and longest.mask.shape == (2, 512)


# Settings.

BACKBONES = ("wan2.1", "wan2.2-a14b", "wan2.2-5b")
PUBLISHED_TRANSFORMER = {
    "_class_name": "WanTransformer3DModel",
    "_diffusers_version": "0.33.0.dev0",
    "added_kv_proj_dim": None,
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "eps": 1e-06,
    "ffn_dim": 8960,
    "freq_dim": 256,
    "image_dim": None,
    "in_channels": 16,
    "num_attention_heads": 12,
    "num_layers": 30,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "pos_embed_seq_len": None,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "text_dim": 4096,
}
PUBLISHED_VAE = {
    "_class_name": "AutoencoderKLWan",
    "attn_scales": [],
    "base_dim": 96,
    "dim_mult": [1, 2, 4, 4],
    "dropout": 0.0,
    "latents_mean": [0.5] * 16,
    "latents_std": [2.5] * 16,
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
    "z_dim": 16,
}
PUBLISHED_VAE_5B = {
    **PUBLISHED_VAE,
    "base_dim": 160,
    "clip_output": False,
    "decoder_base_dim": 256,
    "in_channels": 12,
    "is_residual": True,
    "latents_mean": [0.5] * 48,
    "latents_std": [0.5] * 48,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "scale_factor_temporal": 4,
    "z_dim": 48,
}
PUBLISHED_TEXT_ENCODER = {
    "architectures": ["UMT5EncoderModel"],
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "umt5",
    "num_heads": 64,
    "num_layers": 24,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "scalable_attention": True,
    "tie_word_embeddings": False,
    "tokenizer_class": "T5Tokenizer",
    "vocab_size": 256384,
}


def check(backbone, part, values):
    return check_settings(find_backbone(backbone).settings[part], values, "config.json").arguments()


def build(backbone, part, values):
    """Build a part on the meta device, as it is when it is loaded."""
    part_class = find_backbone(backbone).classes[part]
    arguments = check(backbone, part, values)
    with torch.device("meta"):
        return part_class(part_class.config_class(**arguments)) if part == "text_encoder" else part_class(**arguments)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_published_configurations_are_accepted(backbone):
    small = backbone == "wan2.2-5b"
    channels = {"in_channels": 48, "out_channels": 48} if small else {}
    transformer = build(backbone, "transformer", {**PUBLISHED_TRANSFORMER, **channels, "num_layers": 1})
    vae = build(backbone, "vae", PUBLISHED_VAE_5B if small else PUBLISHED_VAE)
    text_encoder = build(backbone, "text_encoder", {**PUBLISHED_TEXT_ENCODER, "num_layers": 1})
    assert transformer.config.in_channels == vae.config.z_dim == find_backbone(backbone).geometry.channels
    assert transformer.config.text_dim == text_encoder.config.d_model
    assert sum(weight.numel() for weight in vae.parameters()) == (704_688_668 if small else 126_892_531)


def test_every_transformer_of_a_family_has_settings_and_a_class():
    for name in BACKBONES:
        backbone = find_backbone(name)
        parts = {*backbone.family.transformers, *backbone.family.vaes, *backbone.family.text_encoders}
        assert parts <= backbone.settings.keys() & backbone.classes.keys()


def test_the_embeddings_are_tied_whatever_the_configuration_says(folder):
    config = json.loads((folder / "text_encoder/config.json").read_text())
    encoder = build("wan2.1", "text_encoder", {**config, "tie_word_embeddings": False})
    encoder.tie_weights()
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight


@pytest.mark.parametrize(
    ("backbone", "part", "changes", "message"),
    [
        ("wan2.1", "transformer", {"in_channels": 36}, "in_channels is 36; .* text-to-video"),
        ("wan2.2-a14b", "transformer_2", {"in_channels": 36}, "in_channels is 36; .* text-to-video"),
        ("wan2.1", "transformer", {"image_dim": 1280}, "image_dim is 1280; .* text-to-video"),
        ("wan2.1", "transformer", {"added_kv_proj_dim": 5120}, "added_kv_proj_dim is 5120; .* text-to-video"),
        ("wan2.1", "transformer", {"pos_embed_seq_len": 514}, "pos_embed_seq_len is 514; .* text-to-video"),
        ("wan2.1", "transformer", {"in_channels": 48, "out_channels": 48}, "in_channels is 48; expected 16"),
        ("wan2.2-5b", "transformer", {}, "in_channels is 16; expected 48"),
        ("wan2.1", "transformer", {"out_channels": 32}, "out_channels is 32; expected 16"),
        ("wan2.1", "transformer", {"patch_size": [2, 2, 2]}, "patch_size"),
        ("wan2.1", "transformer", {"patch_size": [1, 2]}, "patch_size"),
        ("wan2.1", "transformer", {"attention_head_dim": 7}, "attention_head_dim"),
        ("wan2.1", "transformer", {"qk_norm": "rms_norm"}, "qk_norm"),
        ("wan2.1", "transformer", {"num_layers": 10**9}, "num_layers"),
        ("wan2.1", "transformer", {"ffn_dim": True}, "ffn_dim"),
        ("wan2.1", "transformer", {"eps": float("nan")}, "eps"),
        ("wan2.1", "transformer", {"_class_name": "MochiTransformer3DModel"}, "_class_name"),
        ("wan2.1", "vae", {"z_dim": 48}, "z_dim is 48; expected 16"),
        ("wan2.2-5b", "vae", {}, "z_dim is 16; expected 48"),
        ("wan2.1", "vae", {"dim_mult": [1, 2, 4]}, "temperal_downsample is 3; expected 2"),
        ("wan2.1", "vae", {"dim_mult": [1, 2, 4], "temperal_downsample": [True, True]}, "in space.* is 4; expected 8"),
        ("wan2.1", "vae", {"temperal_downsample": [False, False, True]}, "in time.* is 2; expected 4"),
        ("wan2.1", "vae", {"scale_factor_spatial": 16}, "scale_factor_spatial is 16; expected 8"),
        ("wan2.1", "vae", {"patch_size": 2}, "in space.* is 16; expected 8"),
        ("wan2.1", "vae", {"in_channels": 12}, "in_channels is 12; expected 3"),
        ("wan2.1", "vae", {"attn_scales": [1.0]}, "attn_scales"),
        ("wan2.1", "vae", {"latents_mean": []}, "latents_mean is 0; expected 16"),
        ("wan2.1", "vae", {"latents_std": [1.0] * 15}, "latents_std is 15; expected 16"),
        ("wan2.1", "vae", {"latents_std": [1.0] * 15 + [0.0]}, "latents_std"),
        ("wan2.1", "vae", {"latents_mean": [float("inf")] + [0.0] * 15}, "latents_mean"),
        ("wan2.1", "vae", {"dim_mult": [1] * 60}, "dim_mult"),
        ("wan2.1", "vae", {"base_dim": 10**12}, "base_dim"),
        ("wan2.1", "text_encoder", {"model_type": "t5"}, "model_type"),
        ("wan2.1", "text_encoder", {"vocab_size": 10**12}, "vocab_size"),
        ("wan2.1", "text_encoder", {"relative_attention_num_buckets": 0}, "relative_attention_num_buckets"),
    ],
)
def test_settings_out_of_range_are_refused(backbone, part, changes, message):
    published = {"vae": PUBLISHED_VAE, "text_encoder": PUBLISHED_TEXT_ENCODER}.get(part, PUBLISHED_TRANSFORMER)
    with pytest.raises(WeightsError, match=message) as raised:
        check(backbone, part, {**published, **changes})
    assert len(str(raised.value)) < 1000


def test_a_vae_without_its_statistics_is_refused_where_the_classs_own_are_another_models():
    assert check("wan2.1", "vae", {name: value for name, value in VAE.items()})
    with pytest.raises(WeightsError, match="latents_mean is 16; expected 48"):
        check("wan2.2-5b", "vae", {name: value for name, value in VAE_5B.items() if not name.startswith("latents")})


def test_a_backbone_is_of_the_family_that_it_was_found_for():
    assert [find_backbone(name).family.name for name in BACKBONES] == list(BACKBONES)
    assert Wan().family.name == "wan2.1"


@pytest.mark.parametrize("backbone", BACKBONES)
def test_latents_are_always_normalised(backbone, folder):
    with pytest.raises(ValueError, match=f"latent_space is 'vae'; {backbone} has 'dit' alone"):
        ModelSpec(backbone=backbone, weights=str(folder), latent_space="vae")
    assert find_backbone(backbone).family.latent_spaces == ("dit",)
