"""HunyuanVideo's text features: those of diffusers' pipeline, from files as they are published."""

import json
import logging
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import HunyuanVideoPipeline
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from pusa.backbones.hunyuan_video import FAMILY
from pusa.backbones.hunyuan_video.backbone import HunyuanVideo
from pusa.backbones.hunyuan_video.text import TEMPLATE, PusaLlamaModel, count_template
from pusa.backbones.hunyuan_video.tiny import MAX_TOKENS, TEMPLATE_TOKENS
from pusa.backbones.settings import check_settings
from pusa.errors import WeightsError
from pusa.tiny.training import new_tokenizer
from pusa.weights.load import load_part
from pusa.weights.source import find_part
from tests.helpers.small_tokenizers import (
    CLIP_WORDS,
    write_clip_tokenizer,
    write_clip_vocabulary,
    write_llama_tokenizer,
)

LAYERS = 5
PROMPTS = [
    "a red circle",
    "",
    "\n\n newlines first",
    " a blank first, and one last ",
    "{braces} {} {{0}}",
    "a red <|eot_id|> circle <|begin_of_text|>",
    "sch\u00f6n \u7ea2\u8272 \U0001f600  THE BLUE's 12345\t\r\n x",
    "<|startoftext|> a red <|endoftext|> circle <|ENDOFTEXT|>",
    "a\x00b\u0301",
    "a red circle moves right " * 60,  # more than 77 tokens, and more than 256
]


def randomise(model, seed):
    """Give all weights values that count: norms start as 1, biases as 0, and matrices are small."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.2)
    return model.eval()


def new_llama(words, **settings):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=words, num_hidden_layers=LAYERS, rms_norm_eps=1e-5, **sizes, **settings)
    return randomise(LlamaModel(config), 0)


def new_clip(words, **settings):
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2, "num_hidden_layers": 2}
    return randomise(CLIPTextModel(CLIPTextConfig(vocab_size=words, **sizes, **settings)), 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The parts that encode text, as diffusers and transformers write them."""
    folder = tmp_path_factory.mktemp("hunyuan")
    llama = new_llama(write_llama_tokenizer(folder / "tokenizer"), rope_parameters={"rope_theta": 500_000.0})
    llama.save_pretrained(folder / "text_encoder")
    clip_words = write_clip_vocabulary(folder / "tokenizer_2")
    new_clip(clip_words, eos_token_id=2, bos_token_id=0).save_pretrained(folder / "text_encoder_2")
    return folder


def load(folder, part):
    if part in FAMILY.tokenizers:
        return HunyuanVideo().load_tokenizer(part, folder / part)
    return load_part(HunyuanVideo(), find_part(folder, part, FAMILY), torch.float32)


@pytest.fixture(scope="module")
def parts(folder):
    return {part: load(folder, part) for part in FAMILY.text_parts}


@pytest.fixture(scope="module")
def pipeline(folder):
    """diffusers' pipeline with the same models, as far as it encodes prompts."""
    return SimpleNamespace(
        _execution_device=torch.device("cpu"),
        text_encoder=LlamaModel.from_pretrained(folder / "text_encoder").eval(),
        tokenizer=PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"),
        text_encoder_2=CLIPTextModel.from_pretrained(folder / "text_encoder_2").eval(),
        tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
    )


@torch.no_grad()
def test_features_are_those_of_diffusers_pipeline(parts, pipeline):
    text = HunyuanVideo().encode_text(parts, PROMPTS)
    template = {"template": TEMPLATE, "crop_start": count_template(parts["tokenizer"])}
    features, mask = HunyuanVideoPipeline._get_llama_prompt_embeds(pipeline, PROMPTS, template)
    assert text.features.shape == (len(PROMPTS), 256, 32) and torch.equal(text.mask, mask.bool())
    assert (text.features - features)[text.mask].abs().max() <= 1e-6 * features.abs().max()
    assert text.features[text.mask].std() > 0.5 and not text.features[~text.mask].any()
    pooled = HunyuanVideoPipeline._get_clip_prompt_embeds(pipeline, PROMPTS)
    torch.testing.assert_close(text.pooled, pooled, atol=1e-6, rtol=0)
    assert text.pooled.std() > 0.1
    assert len({tuple(row.tolist()) for row in text.pooled}) == len(PROMPTS)


def test_the_template_is_that_of_diffusers_pipeline():
    assert DEFAULT_PROMPT_TEMPLATE["template"] == TEMPLATE


def test_an_empty_prompt_has_one_valid_token_and_finite_features(parts):
    text = HunyuanVideo().encode_text(parts, ["", "a red circle"])
    assert text.mask.sum(1)[0] == 1 and text.features[0, 0].any()
    assert text.features.isfinite().all() and text.pooled.isfinite().all()


def test_without_padding_and_in_other_batches_the_features_are_the_same(parts):
    backbone, short = HunyuanVideo(), PROMPTS[:-1]
    padded, cut = backbone.encode_text(parts, short), backbone.encode_text(parts, short, padded=False)
    length = cut.features.shape[1]
    assert length == int(padded.mask.sum(1).max()) < 256
    assert torch.equal(cut.mask, padded.mask[:, :length]) and torch.equal(cut.pooled, padded.pooled)
    torch.testing.assert_close(cut.features, padded.features[:, :length], atol=1e-5, rtol=0)
    for number, prompt in enumerate(short):
        alone = backbone.encode_text(parts, [prompt], padded=False)
        valid = cut.features[number][cut.mask[number]]
        torch.testing.assert_close(alone.features[0], valid, atol=1e-5, rtol=0)
        torch.testing.assert_close(alone.pooled[0], cut.pooled[number], atol=1e-5, rtol=0)


def test_a_long_prompt_is_cut_with_a_warning_that_shows_it_and_not_the_template(parts, caplog):
    with caplog.at_level(logging.WARNING):
        text = HunyuanVideo().encode_text(parts, ["the end", PROMPTS[-1]])
    llama, clip = (record.getMessage() for record in caplog.records)
    assert "cut to the first 256 of its 302 tokens for PusaLlamaModel: 'a red circle" in llama
    assert "cut to the first 77 of its " in clip and "for CLIPTextModel: 'a red circle" in clip
    assert text.mask[1].all()


def test_features_that_are_not_finite_do_not_spread_to_the_zeros(parts):
    broken = PusaLlamaModel(parts["text_encoder"].config)
    torch.nn.init.constant_(broken.layers[LAYERS - 3].mlp.down_proj.weight, float("nan"))
    text = HunyuanVideo().encode_text({**parts, "text_encoder": broken.eval()}, ["a red circle"])
    assert text.features[text.mask].isnan().all() and not text.features[~text.mask].any()


def test_dropped_texts_are_the_empty_prompt(parts):
    backbone = HunyuanVideo()
    text, null = backbone.encode_text(parts, PROMPTS[:3]), backbone.encode_text(parts, [""])
    dropped = backbone.drop_text(text, torch.tensor([True, True, False]), null)
    for name in ("features", "mask", "pooled"):
        own, new, empty = getattr(text, name), getattr(dropped, name), getattr(null, name)
        assert torch.equal(new[:2], own[:2]) and torch.equal(new[2], empty[0]) and not torch.equal(own[2], empty[0])


# The models.


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_llama_without_its_last_layers_is_llamas_hidden_state(folder, dtype):
    ours = load_part(HunyuanVideo(), find_part(folder, "text_encoder", FAMILY), dtype)
    plain = LlamaModel.from_pretrained(folder / "text_encoder", dtype=dtype).eval()
    assert sum(bool([*layer.parameters()]) for layer in ours.layers) == LAYERS - 2 and ours.dtype == dtype
    for lengths in ((9,), (1, 30, 7), (3, 3)):
        ids = torch.randint(480, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(2))
        mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
        states = plain(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        assert len(states) == LAYERS + 1
        features = ours(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        assert torch.equal(features[mask], states[-3][mask]) and features.std() > 0.1


def edit_weights(source, target, change):
    """Copy the folder of a part with other tensors."""
    shutil.copytree(source, target)
    tensors = change(load_file(source / "model.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors")
    return target.parent


def test_the_layers_that_are_left_out_are_not_read(folder, tmp_path):
    def spoil(tensors):
        unused = (f"layers.{LAYERS - 2}.", f"layers.{LAYERS - 1}.", "norm.")
        spoilt = {name for name in tensors if name.startswith(unused)}
        assert len(spoilt) == 2 * 9 + 1
        return {n: torch.full_like(t, float("nan")) if n in spoilt else t for n, t in tensors.items()}

    root = edit_weights(folder / "text_encoder", tmp_path / "text_encoder", spoil)
    expected = load(folder, "text_encoder").state_dict()
    found = load(root, "text_encoder").state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", ["layers.5.mlp.up_proj.weight", "layers.2.extra.weight", "head.weight"])
def test_any_other_tensor_is_refused(folder, tmp_path, name):
    root = edit_weights(
        folder / "text_encoder", tmp_path / "text_encoder", lambda tensors: {**tensors, name: torch.zeros(2)}
    )
    with pytest.raises(WeightsError, match=rf"unexpected.*{name}"):
        load(root, "text_encoder")


@torch.no_grad()
@pytest.mark.parametrize(
    ("part", "prefix", "others"),
    [
        ("text_encoder", "model.", {"lm_head.weight": torch.zeros(9, 32)}),
        ("text_encoder_2", "", {"embeddings.position_ids": torch.arange(77)[None]}),
        ("text_encoder_2", "text_model.", {"text_model.embeddings.position_ids": torch.arange(77)[None]}),
    ],
)
def test_names_of_a_larger_model_are_read(folder, tmp_path, part, prefix, others):
    def rename(tensors):
        names = {name: name.removeprefix("text_model.") for name in tensors}
        return {prefix + names[name]: tensor for name, tensor in tensors.items()} | others

    root = edit_weights(folder / part, tmp_path / part, rename)
    expected, found = load(folder, part), load(root, part)
    ids = torch.randint(480, (2, 9), generator=torch.Generator().manual_seed(2))
    assert torch.equal(found(ids).last_hidden_state, expected(ids).last_hidden_state)


# Settings.

PUBLISHED_LLAMA = {
    "architectures": ["LlamaModel"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": [128001, 128009], "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 8192, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "pad_token_id": 128258, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 500000.0,
    "tie_word_embeddings": False, "torch_dtype": "float16", "use_cache": True, "vocab_size": 128320,
}  # fmt: skip
PUBLISHED_CLIP = {
    "architectures": ["CLIPTextModel"], "attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2,
    "hidden_act": "quick_gelu", "hidden_size": 768, "initializer_factor": 1.0, "initializer_range": 0.02,
    "intermediate_size": 3072, "layer_norm_eps": 1e-05, "max_position_embeddings": 77,
    "model_type": "clip_text_model", "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1,
    "projection_dim": 768, "torch_dtype": "float16", "vocab_size": 49408,
}  # fmt: skip


def check(part, values):
    return check_settings(HunyuanVideo.settings[part], values, "config.json").arguments()


def test_the_published_configurations_are_accepted():
    llama, clip = check("text_encoder", PUBLISHED_LLAMA), check("text_encoder_2", PUBLISHED_CLIP)
    with torch.device("meta"):
        sizes = (PusaLlamaModel(LlamaConfig(**llama)), CLIPTextModel(CLIPTextConfig(**clip)))
    assert [sum(weight.numel() for weight in model.parameters()) for model in sizes] == [7_068_958_720, 123_060_480]
    assert check("text_encoder", {}) == llama | {"head_dim": None}
    assert check("text_encoder_2", {}) == clip


def edit_config(source, target, change):
    shutil.copytree(source, target)
    config = json.loads((source / "config.json").read_text())
    change(config)
    (target / "config.json").write_text(json.dumps(config))
    return target.parent


@torch.no_grad()
@pytest.mark.parametrize("written", ["older", "newer"])
@pytest.mark.parametrize("theta", [10_000.0, 123.0])
def test_the_rotation_of_positions_is_read_as_transformers_reads_it(folder, tmp_path, written, theta):
    def change(config):
        assert config.pop("rope_parameters")["rope_theta"] == 500_000
        rope = {"rope_theta": theta}
        config |= {**rope, "rope_scaling": None} if written == "older" else {"rope_parameters": rope}

    root = edit_config(folder / "text_encoder", tmp_path / "text_encoder", change)
    ids = torch.randint(480, (2, 40), generator=torch.Generator().manual_seed(2))
    plain = LlamaModel.from_pretrained(root / "text_encoder").eval()
    features = load(root, "text_encoder")(ids, use_cache=False).last_hidden_state
    assert torch.equal(features, plain(ids, output_hidden_states=True).hidden_states[-3])
    assert (features - load(folder, "text_encoder")(ids, use_cache=False).last_hidden_state).abs().max() > 0.1


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("text_encoder", {"model_type": "qwen2"}, "model_type"),
        ("text_encoder", {"num_hidden_layers": 2}, "num_hidden_layers"),
        ("text_encoder", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ("text_encoder", {"num_key_value_heads": 5}, "num_attention_heads is 32; expected a multiple of .*, 5"),
        ("text_encoder", {"num_key_value_heads": 0}, "num_key_value_heads"),
        ("text_encoder", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling"),
        ("text_encoder", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type"),
        ("text_encoder", {"rope_parameters": {"rope_type": "default"}}, "rope_theta"),
        ("text_encoder", {"rope_theta": 0}, "rope_theta"),
        ("text_encoder", {"hidden_act": "gelu"}, "hidden_act"),
        ("text_encoder", {"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ("text_encoder", {"head_dim": 127}, "head_dim"),
        ("text_encoder_2", {"model_type": "clip"}, "model_type"),
        ("text_encoder_2", {"eos_token_id": [2]}, "eos_token_id"),
        ("text_encoder_2", {"max_position_embeddings": 1}, "max_position_embeddings"),
        ("text_encoder_2", {"vocab_size": True}, "vocab_size"),
        ("text_encoder_2", {"hidden_act": "relu"}, "hidden_act"),
    ],
)
def test_settings_out_of_range_are_refused(part, changes, message):
    published = PUBLISHED_LLAMA if part == "text_encoder" else PUBLISHED_CLIP
    with pytest.raises(WeightsError, match=message) as raised:
        check(part, {**published, **changes})
    assert len(str(raised.value)) < 1000


# Tokenizers.


def test_llamas_tokenizer_is_read_as_transformers_reads_it(folder, parts):
    ours, theirs = parts["tokenizer"], PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    for how in ({}, {"padding": "max_length", "max_length": 40, "truncation": True}):
        found, expected = ours(PROMPTS, **how), theirs(PROMPTS, **how)
        assert found.input_ids == expected.input_ids and found.attention_mask == expected.attention_mask
    assert ours.convert_ids_to_tokens(ours(TEMPLATE).input_ids)[:3] == [
        "<|begin_of_text|>", "<|start_header_id|>", "system",
    ]  # fmt: skip


@pytest.mark.parametrize("layout", ["merges", "tokenizer", "older tokenizer", "both"])
def test_clips_tokenizer_is_read_as_transformers_reads_it(tmp_path, layout):
    if layout in ("merges", "both"):
        write_clip_vocabulary(tmp_path / "tokenizer_2")
    else:
        special = r"<\|startoftext\|>|<\|endoftext\|>|"
        write_clip_tokenizer(tmp_path / "tokenizer_2", (special if layout == "tokenizer" else "") + CLIP_WORDS)
    theirs = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer_2")
    if layout == "both":
        theirs.save_pretrained(tmp_path / "tokenizer_2")
    ours = load(tmp_path, "tokenizer_2")
    for how in ({}, {"padding": "max_length", "max_length": 77, "truncation": True}):
        found, expected = ours(PROMPTS, **how), theirs(PROMPTS, **how)
        assert found.input_ids == expected.input_ids and found.attention_mask == expected.attention_mask
    assert ours.convert_ids_to_tokens(ours("").input_ids) == ["<|startoftext|>", "<|endoftext|>"]
    assert ours.model_max_length == 77 and ours.pad_token == "<|endoftext|>"


@pytest.mark.parametrize("settings", [{"pad_token": None, "unk_token": None}, {"pad_token": None}])
def test_a_llama_tokenizer_without_a_token_to_pad_with_gives_the_same_features(folder, parts, tmp_path, settings):
    write_llama_tokenizer(tmp_path / "tokenizer", others=(), **settings)
    other = load(tmp_path, "tokenizer")
    assert other.pad_token == "<|end_of_text|>"
    backbone = HunyuanVideo()
    expected, found = (
        backbone.encode_text({**parts, "tokenizer": tokenizer}, PROMPTS[:4])
        for tokenizer in (parts["tokenizer"], other)
    )
    assert torch.equal(found.mask, expected.mask) and torch.equal(found.features, expected.features)


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2"])
def test_the_tiny_models_tokenizers_are_read_by_the_same_function(tmp_path, part):
    limit = TEMPLATE_TOKENS + MAX_TOKENS if part == "tokenizer" else MAX_TOKENS
    new_tokenizer(limit).save_pretrained(tmp_path / part)
    tokenizer = load(tmp_path, part)
    assert tokenizer.model_max_length == limit and tokenizer.pad_token == "<pad>"
    if part == "tokenizer":
        assert count_template(tokenizer) == TEMPLATE_TOKENS
    else:
        with pytest.raises(WeightsError, match="leaves no token for a prompt: 99 come before it, and there are 16"):
            count_template(tokenizer)


def test_a_template_that_hides_the_prompt_is_refused(parts, tmp_path):
    """Each of these words is unknown, "a" too."""
    new_tokenizer(TEMPLATE_TOKENS + MAX_TOKENS).save_pretrained(tmp_path / "tokenizer")
    path = tmp_path / "tokenizer/tokenizer.json"
    values = json.loads(path.read_text())
    values["pre_tokenizer"] = None
    path.write_text(json.dumps(values))
    with pytest.raises(WeightsError, match="leaves no token for a prompt"):
        HunyuanVideo().encode_text({**parts, "tokenizer": load(tmp_path, "tokenizer")}, ["a"])


def test_a_tokenizer_that_does_not_end_texts_as_clip_expects_is_refused(folder, parts):
    words = parts["text_encoder_2"].get_input_embeddings().num_embeddings
    for end, is_known in ((words - 1, True), (5, False)):
        clip = {**parts, "text_encoder_2": new_clip(words, eos_token_id=end)}
        if is_known:
            assert HunyuanVideo().encode_text(clip, PROMPTS).pooled.isfinite().all()
        else:
            with pytest.raises(WeightsError, match="does not end a text with the token 5"):
                HunyuanVideo().encode_text(clip, PROMPTS)


def test_tokenizers_of_another_model_are_refused(parts):
    with pytest.raises(WeightsError, match="leaves no token for a prompt: 118 come before it, and there are 77 in all"):
        HunyuanVideo().encode_text({**parts, "tokenizer": parts["tokenizer_2"]}, ["a red circle"])
    with pytest.raises(WeightsError, match=r"the tokenizer gives the token \d+; the text encoder knows 300 tokens"):
        HunyuanVideo().encode_text({**parts, "text_encoder": new_llama(300)}, ["a red circle"])
