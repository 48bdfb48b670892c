"""List the tensors of Llama and CLIP, HunyuanVideo's text encoders, and read their settings from shapes.

Their names are those of transformers everywhere; a tool may write a prefix. What the shapes do not show is as in the
published models, Llama 3 8B and CLIP ViT-L, or else in the file's metadata.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pusa.backbones.family import Rule, Shapes, affine, count_modules

LLAMA_MARK = "layers.0.post_attention_layernorm.weight"
CLIP_MARK = "embeddings.token_embedding.weight"
_ROPE = ("rope_theta", "rope_parameters")  # of Llama: transformers 5 writes the second
IN_METADATA = ("num_attention_heads", "eos_token_id", "hidden_act", *_ROPE, "rms_norm_eps", "layer_norm_eps")
LLAMA_HEAD, CLIP_HEAD = 128, 64  # widths
_LLAMA_LAYER, _CLIP_LAYER = "layers.{}.self_attn.q_proj.weight", "encoder.layers.{}.self_attn.q_proj.weight"
_LLAMA_MODULES = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    "input_layernorm",
    "post_attention_layernorm",
)
_CLIP_MODULES = (
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
    "mlp.fc1",
    "mlp.fc2",
    "layer_norm1",
    "layer_norm2",
)


def _weights(modules: Iterable[str]) -> Iterator[Rule]:
    for module in modules:
        yield Rule(f"{module}.weight", (f"{module}.weight",))


def llama_rules(names: set[str]) -> Iterator[Rule]:
    """Yield the rules of all tensors of a LlamaModel."""
    yield from _weights(("embed_tokens", "norm"))
    for layer in range(count_modules(names, _LLAMA_LAYER, _LLAMA_LAYER)):
        yield from _weights(f"layers.{layer}.{module}" for module in _LLAMA_MODULES)


def clip_rules(names: set[str]) -> Iterator[Rule]:
    """Yield the rules of all tensors of a CLIPTextModel."""
    yield from _weights(("embeddings.token_embedding", "embeddings.position_embedding"))
    yield from affine("final_layer_norm", "final_layer_norm")
    for layer in range(count_modules(names, _CLIP_LAYER, _CLIP_LAYER)):
        for module in _CLIP_MODULES:
            yield from affine(f"encoder.layers.{layer}.{module}", f"encoder.layers.{layer}.{module}")


def llama_config(t: Shapes, stated: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of transformers' LlamaModel.

    Raises:
        ValueError: the number of heads is not stated, and the width is not a multiple of a published head's.
    """
    words, width = t["embed_tokens.weight"]
    known = _stated(stated, width, LLAMA_HEAD)
    heads = known["num_attention_heads"]
    return {
        "architectures": ["LlamaModel"],
        "model_type": "llama",
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": t["layers.0.mlp.gate_proj.weight"][0],
        "num_hidden_layers": count_modules(set(t), _LLAMA_LAYER, _LLAMA_LAYER),
        "num_key_value_heads": t["layers.0.self_attn.k_proj.weight"][0] // (width // heads),
        "max_position_embeddings": 8192,
        **{"hidden_act": "silu", "rms_norm_eps": 1e-5},
        **({} if "rope_theta" in known else {"rope_parameters": {"rope_theta": 500_000.0, "rope_type": "default"}}),
        **{name: value for name, value in known.items() if name != "layer_norm_eps"},
    }


def clip_config(t: Shapes, stated: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of transformers' CLIPTextModel.

    Raises:
        ValueError: the number of heads is not stated, and the width is not a multiple of a published head's.
    """
    words, width = t["embeddings.token_embedding.weight"]
    known = _stated(stated, width, CLIP_HEAD)
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": t["encoder.layers.0.mlp.fc1.weight"][0],
        "projection_dim": width,
        "num_hidden_layers": count_modules(set(t), _CLIP_LAYER, _CLIP_LAYER),
        "max_position_embeddings": t["embeddings.position_embedding.weight"][0],
        **{"hidden_act": "quick_gelu", "eos_token_id": 2, "layer_norm_eps": 1e-5},
        **{name: value for name, value in known.items() if not name.startswith(("rope", "rms"))},
    }


def _stated(stated: Mapping[str, Any], width: int, head: int) -> dict[str, Any]:
    """Return the settings that are stated, and the number of heads: by default of the published width."""
    known = {name: json.loads(stated[name]) for name in IN_METADATA if name in stated}
    if "num_attention_heads" not in known and width % head:
        raise ValueError(
            f"the width {width} is not a multiple of {head}, a head's in the published model; keep the encoder in a "
            "folder with its config.json, or add num_attention_heads to the file's metadata"
        )
    return {"num_attention_heads": width // head, **known}
