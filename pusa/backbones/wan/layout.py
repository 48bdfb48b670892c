"""Map the original names of Wan's files to diffusers' names, in both directions. Nothing differs besides names.

Published layouts: a transformer in shards with a `config.json` of class WanModel, at the root of the repository, or
one for each expert in `high_noise_model/` and `low_noise_model/`; VAE and text encoder as pickles. ComfyUI keeps the
same names in single safetensors files. Sources: wan/modules/{model,vae2_1,vae2_2,t5}.py of Wan-Video/Wan2.2.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import Any

from pusa.backbones.family import Layout, LayoutFile, Rule, Shapes, affine, count_modules
from pusa.backbones.wan import vae_layout

HEAD_WIDTH = 128  # of every published transformer: the number of heads does not show in the shapes
EPS = 1e-6
_TEXT_WIDTH = 4096  # of the features of UMT5-XXL
_COMMON = {
    "_class_name": "WanTransformer3DModel",
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": EPS,
}

# Module of a transformer's block: original -> diffusers. The other two norms of a block have no weights.
_BLOCK_MODULES = {
    **{
        f"{theirs}.{name}": f"{ours}.{our_name}"
        for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for name, our_name in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))
    },
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
_BLOCK = "blocks.{}.self_attn.q.weight"
_ENDS = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
}


def _transformer(names: set[str]) -> Iterator[Rule]:
    for theirs, ours in _ENDS.items():
        yield from affine(theirs, ours)
    yield Rule("head.modulation", ("scale_shift_table",))
    for block in range(count_modules(names, _BLOCK, "blocks.{}.attn1.to_q.weight")):
        for theirs, ours in _BLOCK_MODULES.items():
            yield from affine(f"blocks.{block}.{theirs}", f"blocks.{block}.{ours}")
        for (theirs, ours), norm in itertools.product(
            (("self_attn", "attn1"), ("cross_attn", "attn2")), ("norm_q", "norm_k")
        ):
            yield Rule(f"blocks.{block}.{theirs}.{norm}.weight", (f"blocks.{block}.{ours}.{norm}.weight",))
        yield Rule(f"blocks.{block}.modulation", (f"blocks.{block}.scale_shift_table",))


def _text_encoder(names: set[str]) -> Iterator[Rule]:
    yield Rule("token_embedding.weight", ("shared.weight",))
    attention = "encoder.block.{}.layer.0.SelfAttention"
    for block in range(count_modules(names, "blocks.{}.attn.q.weight", attention + ".q.weight")):
        theirs, ours = f"blocks.{block}", f"encoder.block.{block}.layer"
        for name in "qkvo":
            yield Rule(f"{theirs}.attn.{name}.weight", (f"{ours}.0.SelfAttention.{name}.weight",))
        for name, our_name in (
            ("pos_embedding.embedding", "0.SelfAttention.relative_attention_bias"),
            ("norm1", "0.layer_norm"),
            ("norm2", "1.layer_norm"),
            ("ffn.gate.0", "1.DenseReluDense.wi_0"),
            ("ffn.fc1", "1.DenseReluDense.wi_1"),
            ("ffn.fc2", "1.DenseReluDense.wo"),
        ):
            yield Rule(f"{theirs}.{name}.weight", (f"{ours}.{our_name}.weight",))
    yield Rule("norm.weight", ("encoder.final_layer_norm.weight",))


def _transformer_config(t: Shapes, stated: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of diffusers' WanTransformer3DModel.

    All but the number of heads is read from the shapes. That is stated in the authors' config.json; without one, a head
    is 128 wide, as in every published model.

    Raises:
        ValueError: the width is not a multiple of a head's, or the statements and the shapes differ.
    """
    width, channels, *patch = t["patch_embedding.weight"]
    found = {
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": t["proj_out.weight"][0] // prod(patch),
        "text_dim": t["condition_embedder.text_embedder.linear_1.weight"][1],
        "freq_dim": t["condition_embedder.time_embedder.linear_1.weight"][1],
        "ffn_dim": t["blocks.0.ffn.net.0.proj.weight"][0],
        "num_layers": count_modules(set(t), "", "blocks.{}.attn1.to_q.weight"),
    }
    if "_class_name" not in stated:
        if width % HEAD_WIDTH:
            raise ValueError(
                f"without the config.json of its authors a head is {HEAD_WIDTH} wide, and the width {width} is not a "
                "multiple of that; keep the config.json beside the file"
            )
        heads = width // HEAD_WIDTH
        return {**_COMMON, **found, "num_attention_heads": heads, "attention_head_dim": HEAD_WIDTH}
    settings = _from_original(stated)
    found["width"] = width
    stated_width = settings["num_attention_heads"] * settings["attention_head_dim"]
    differ = [
        f"{name} is {value} in the tensors, {known} by config.json"
        for name, value in found.items()
        if (known := {"width": stated_width, **settings}.get(name)) != value
    ]
    if differ:
        raise ValueError("; ".join(differ))
    return settings


def _from_original(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of diffusers' class from the authors' config.json, which leaves out what is always so."""
    width, heads = config["dim"], config["num_heads"]
    if type(width) is not int or type(heads) is not int or heads < 1 or width % heads:
        raise ValueError(f"dim {width!r:.80} is not a multiple of num_heads {heads!r:.80}")
    return {
        **_COMMON,
        "patch_size": list(config.get("patch_size", (1, 2, 2))),
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": config.get("in_dim", 16),
        "out_channels": config.get("out_dim", 16),
        "text_dim": config.get("text_dim", _TEXT_WIDTH),
        "freq_dim": config.get("freq_dim", 256),
        "ffn_dim": config["ffn_dim"],
        "num_layers": config["num_layers"],
        "eps": config.get("eps", EPS),
    }


def _to_original(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the authors' config.json of a transformer with these settings of diffusers' class."""
    channels, text = config.get("in_channels", 16), config.get("text_dim", _TEXT_WIDTH)
    return {
        "_class_name": "WanModel",
        "dim": config["num_attention_heads"] * config["attention_head_dim"],
        "eps": config.get("eps", EPS),
        "ffn_dim": config["ffn_dim"],
        "freq_dim": config.get("freq_dim", 256),
        "in_dim": channels,
        "model_type": "t2v" if channels == 16 else "ti2v",
        "num_heads": config["num_attention_heads"],
        "num_layers": config["num_layers"],
        "out_dim": config.get("out_channels") or channels,
        **({"text_dim": text} if text != _TEXT_WIDTH else {}),
        "text_len": 512,
    }


def _text_config(t: Shapes, stated: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of transformers' UMT5EncoderModel."""
    words, width = t["shared.weight"]
    buckets, heads = t["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    return {
        "architectures": ["UMT5EncoderModel"],
        "model_type": "umt5",
        "vocab_size": words,
        "d_model": width,
        "d_kv": t["encoder.block.0.layer.0.SelfAttention.q.weight"][0] // heads,
        "d_ff": t["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
        "num_layers": count_modules(set(t), "", "encoder.block.{}.layer.0.SelfAttention.q.weight"),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": EPS,
        "dropout_rate": 0.1,
        "tie_word_embeddings": False,
    }


_TRANSFORMER = LayoutFile(
    name="diffusion_pytorch_model.safetensors",
    part="transformer",
    prefix="",
    mark=_BLOCK.format(0),
    diffusers_mark="condition_embedder.time_proj.weight",
    rules=_transformer,
    config=_transformer_config,
    blocks=(_BLOCK,),
    prefixes=("model.diffusion_model.",),
    original_class="WanModel",
    original_config=_to_original,
    from_original=_from_original,
)
_HIGH = replace(
    _TRANSFORMER, name=f"high_noise_model/{_TRANSFORMER.name}", named=r"(?i)high[_-]?noise|a14b[_-]high(?![a-z])"
)
_LOW = replace(
    _TRANSFORMER,
    name=f"low_noise_model/{_TRANSFORMER.name}",
    part="transformer_2",
    named=r"(?i)low[_-]?noise|a14b[_-]low(?![a-z])|^transformer_2$",
)
_VAE_2_1 = LayoutFile(
    name="Wan2.1_VAE.safetensors",
    part="vae",
    prefix="",
    mark="encoder.downsamples.0.residual.2.weight",
    diffusers_mark="encoder.down_blocks.0.conv1.weight",
    rules=vae_layout.plain_rules,
    config=vae_layout.config,
    pickle="Wan2.1_VAE.pth",
)
_VAE_2_2 = LayoutFile(
    name="Wan2.2_VAE.safetensors",
    part="vae",
    prefix="",
    mark="encoder.downsamples.0.downsamples.0.residual.2.weight",
    diffusers_mark="encoder.down_blocks.0.resnets.0.conv1.weight",
    rules=vae_layout.residual_rules,
    config=vae_layout.config,
    pickle="Wan2.2_VAE.pth",
)
_TEXT_ENCODER = LayoutFile(
    name="models_t5_umt5-xxl-enc-bf16.safetensors",
    part="text_encoder",
    prefix="",
    mark="blocks.1.pos_embedding.embedding.weight",
    diffusers_mark="encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight",  # of other T5: block 0 alone
    rules=_text_encoder,
    config=_text_config,
    spare=(("encoder.embed_tokens.weight", "shared.weight"), ("spiece_model", "")),  # the last: ComfyUI's tokenizer
    stem="model",
    pickle="models_t5_umt5-xxl-enc-bf16.pth",
)
LAYOUT = Layout(
    name="wan",
    files=(_TRANSFORMER, _VAE_2_1, _TEXT_ENCODER),
    in_metadata=vae_layout.STATISTICS,
    folders={"tokenizer": "google/umt5-xxl"},
    refused={
        r"^img_emb\.|\.k_img\.|image_embedder\.|\.add_k_proj\.": "it is an image-to-video model with an image encoder; "
        "use the text-to-video model, which makes videos from images with Pusa",
        r"^vace_": "it is a VACE model; use the text-to-video model",
    },
    safetensors_at="Wan-AI/Wan2.1-T2V-14B-Diffusers",
)
LAYOUT_A14B = replace(
    LAYOUT, files=(_HIGH, _LOW, _VAE_2_1, _TEXT_ENCODER), safetensors_at="Wan-AI/Wan2.2-T2V-A14B-Diffusers"
)
LAYOUT_5B = replace(
    LAYOUT, files=(_TRANSFORMER, _VAE_2_2, _TEXT_ENCODER), safetensors_at="Wan-AI/Wan2.2-TI2V-5B-Diffusers"
)
