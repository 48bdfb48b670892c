"""HunyuanVideo's layouts at published widths: names both ways, settings from shapes, the other tools' names."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoTransformer3DModel
from diffusers.loaders.single_file_utils import convert_hunyuan_video_transformer_to_diffusers
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

from pusa.backbones import find_family
from pusa.backbones.base import find_backbone
from pusa.backbones.family import Rule
from pusa.backbones.settings import check_settings
from pusa.weights.stored import StoredModel
from pusa.weights.tensors import ByteRange, StoredTensor

LLAMA = {
    "vocab_size": 128_320,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 3,
    "num_attention_heads": 32,
    "max_position_embeddings": 8192,
    "num_key_value_heads": 8,
    "rope_theta": 500_000.0,
    "rms_norm_eps": 1e-5,
}
CLIP = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_attention_heads": 12,
    "num_hidden_layers": 3,
    "eos_token_id": 2,
}
LAYERS = {"num_layers": 2, "num_single_layers": 3, "num_refiner_layers": 2}
PUBLISHED = {
    "transformer": lambda: HunyuanVideoTransformer3DModel(**LAYERS),
    "transformer without guidance": lambda: HunyuanVideoTransformer3DModel(**LAYERS, guidance_embeds=False),
    "vae": lambda: AutoencoderKLHunyuanVideo(),
    "text_encoder": lambda: LlamaModel(LlamaConfig(**LLAMA)),
    "text_encoder_2": lambda: CLIPTextModel(CLIPTextConfig(**CLIP)),
}


@pytest.fixture(scope="module", params=PUBLISHED)
def published(request) -> tuple[StoredModel, dict]:
    """Return the names and shapes of a published model without content, and its configuration."""
    with torch.device("meta"):
        model = PUBLISHED[request.param]()
    tensors = {
        name: StoredTensor("F32", tuple(weight.shape), (ByteRange(Path(), 0, weight.numel() * 4),))
        for name, weight in model.state_dict().items()
    }
    (file,) = [file for file in find_family("hunyuan_video").layout.files if file.diffusers_mark in tensors]
    config = model.config
    values = config.to_dict() if hasattr(config, "to_dict") else json.loads(json.dumps(dict(config)))
    return StoredModel(Path("published"), tensors, {}, "diffusers", (file,)), values


def test_every_name_goes_both_ways_and_the_settings_show_in_the_shapes(published):
    model, config = published
    (file,) = model.files
    back = replace(model, tensors=model.in_original_names(file), layout="hunyuan_video")
    ours = back.in_diffusers_names()
    assert {name: ours[name].shape for name in ours} == {name: model.tensors[name].shape for name in model.tensors}
    derived = back.config()
    known = {name: derived[name] for name in derived if name[0] != "_" and name != "architectures"}
    assert {name: (value, config[name]) for name, value in known.items() if config[name] != value} == {}
    kind = find_backbone("hunyuan_video").settings[model.part]
    check_settings(kind, {name: value for name, value in derived.items() if name[0] != "_"}, "here")


def test_each_name_has_one_other_spelling_which_leads_back(published):
    model, _ = published
    (file,) = model.files
    names = {name: file.spell(name) for name in model.in_original_names(file)}
    assert len(set(names.values())) == len(names)
    assert {file.unspell(other): other for other in names.values()} == names
    assert [name for name in names if file.unspell(name) != name] == []
    if model.part == "transformer":
        written = set(names.values())
        assert written >= {
            "txt_in.individual_token_refiner.blocks.1.self_attn.qkv.weight",  # by which others know the file
            "double_blocks.1.img_attn.norm.query_norm.scale",
            "single_blocks.2.norm.key_norm.scale",
            "single_blocks.2.modulation.lin.bias",
            "time_in.in_layer.weight",
            "vector_in.in_layer.weight",
        }
        later = {name.replace("_norm.scale", "_norm.weight"): name for name in written}
        assert {file.unspell(name) for name in later} == set(names)
    if model.part == "vae":
        assert {"decoder.mid.attn_1.k.bias", "decoder.up.3.block.2.conv1.conv.weight"} <= set(names.values())
        assert (
            names["decoder.up_blocks.2.resnets.0.conv_shortcut.conv.bias"]
            == "decoder.up.1.block.0.nin_shortcut.conv.bias"
        )


def test_diffusers_converter_has_the_same_names_at_published_width(published):
    model, _ = published
    if model.part != "transformer":
        return
    with torch.device("meta"):
        tensors = {n: torch.empty(stored.shape) for n, stored in model.in_original_names(model.files[0]).items()}
        theirs = convert_hunyuan_video_transformer_to_diffusers(tensors)
    assert {name: tuple(tensor.shape) for name, tensor in theirs.items()} == {
        name: stored.shape for name, stored in model.tensors.items()
    }


def test_a_rule_says_how_many_rows_each_part_has():
    equal, squares = Rule("a", ("q", "k", "v")), Rule("a", ("q", "k", "v", "mlp"), squares=True)
    assert equal.rows_of(12, None) == [4, 4, 4]
    assert squares.rows_of(21, 3) == [3, 3, 3, 12] and squares.rows_of(10, 3) == [3, 3, 3, 1]
    for rule, rows, inputs, message in (
        (equal, 11, None, "11 rows cannot be split into 3 equal parts"),
        (equal, 0, 4, "0 rows cannot be split into 3 equal parts"),
        (squares, 9, 3, "9 rows cannot be split into 3 times 3 rows and a rest"),
        (squares, 21, None, "the inputs of the layer are not known, so its 21 rows cannot be split"),
    ):
        with pytest.raises(ValueError, match=message):
            rule.rows_of(rows, inputs)
