"""Map the original names of HunyuanVideo's files to diffusers' names, in both directions.

The authors publish the transformer and the VAE as pickles. Kijai's repository has both in the authors' names as
safetensors files, ComfyUI's has them in names of its own; both have Llama and CLIP in the names of transformers.
Besides names, three things differ: diffusers splits each qkv in three; it splits the first matrix of a single-stream
block into q, k, v and the MLP's; and it has the two halves of the last modulation in the other order. Sources:
hyvideo/modules/{models,token_refiner}.py of Tencent-Hunyuan/HunyuanVideo, comfy/ldm/hunyuan_video/model.py of ComfyUI.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pusa.backbones.family import Layout, LayoutFile, Rule, Shapes, affine, count_modules
from pusa.backbones.hunyuan_video import text_layout, vae_layout

DOUBLE, SINGLE = "double_blocks.{}", "single_blocks.{}"
REFINER = "txt_in.individual_token_refiner.blocks.{}"
OUR_DOUBLE, OUR_SINGLE = "transformer_blocks.{}", "single_transformer_blocks.{}"
OUR_REFINER = "context_embedder.token_refiner.refiner_blocks.{}"
# A tensor that each block has, and one that only models have which were distilled with guidance.
_DOUBLE_MARK, _OUR_DOUBLE_MARK = DOUBLE + ".img_attn_qkv.weight", OUR_DOUBLE + ".attn.to_q.weight"
_SINGLE_MARK, _OUR_SINGLE_MARK = SINGLE + ".linear1.weight", OUR_SINGLE + ".proj_mlp.weight"
_REFINER_MARK, _OUR_REFINER_MARK = REFINER + ".norm1.weight", OUR_REFINER + ".norm1.weight"
_GUIDANCE_MARK = "guidance_in.mlp.0.weight"
_OUR_GUIDANCE_MARK = "time_text_embed.guidance_embedder.linear_1.weight"

AXES = (16, 56, 56)  # of the rotary angles of every published model, whose heads are 128 wide
IN_METADATA = ("rope_axes_dim", *vae_layout.IN_METADATA, *text_layout.IN_METADATA)

_ENDS = {
    "img_in.proj": "x_embedder.proj",
    "time_in.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "time_in.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "txt_in.input_embedder": "context_embedder.proj_in",
    "txt_in.t_embedder.mlp.0": "context_embedder.time_text_embed.timestep_embedder.linear_1",
    "txt_in.t_embedder.mlp.2": "context_embedder.time_text_embed.timestep_embedder.linear_2",
    "txt_in.c_embedder.linear_1": "context_embedder.time_text_embed.text_embedder.linear_1",
    "txt_in.c_embedder.linear_2": "context_embedder.time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
_GUIDANCE = {
    "guidance_in.mlp.0": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.mlp.2": "time_text_embed.guidance_embedder.linear_2",
}
_REFINER_MODULES = {
    "norm1": "norm1",
    "norm2": "norm2",
    "self_attn_proj": "attn.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm_out.linear",
}
_DOUBLE_MODULES = {
    "img_mod.linear": "norm1.linear",
    "txt_mod.linear": "norm1_context.linear",
    "img_attn_proj": "attn.to_out.0",
    "txt_attn_proj": "attn.to_add_out",
    "img_mlp.fc1": "ff.net.0.proj",
    "img_mlp.fc2": "ff.net.2",
    "txt_mlp.fc1": "ff_context.net.0.proj",
    "txt_mlp.fc2": "ff_context.net.2",
}
_DOUBLE_NORMS = {
    "img_attn_q_norm": "norm_q",
    "img_attn_k_norm": "norm_k",
    "txt_attn_q_norm": "norm_added_q",
    "txt_attn_k_norm": "norm_added_k",
}
_QKV, _TEXT_QKV = ("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")

# Parts of the authors' names, and ComfyUI's in their place. Of the last pairs, its later versions write the second.
_COMFY = (
    ("time_in.mlp.0.", "time_in.in_layer."),
    ("time_in.mlp.2.", "time_in.out_layer."),
    ("guidance_in.mlp.0.", "guidance_in.in_layer."),
    ("guidance_in.mlp.2.", "guidance_in.out_layer."),
    ("t_embedder.mlp.0.", "t_embedder.in_layer."),
    ("t_embedder.mlp.2.", "t_embedder.out_layer."),
    ("c_embedder.linear_1.", "c_embedder.in_layer."),
    ("c_embedder.linear_2.", "c_embedder.out_layer."),
    ("refiner.blocks.{}.mlp.fc1.", "refiner.blocks.{}.mlp.0."),
    ("refiner.blocks.{}.mlp.fc2.", "refiner.blocks.{}.mlp.2."),
    *(
        (f"{stream}_mlp.{theirs}.", f"{stream}_mlp.{ours}.")
        for stream in ("img", "txt")
        for theirs, ours in (("fc1", 0), ("fc2", 2))
    ),
    ("_mod.linear.", "_mod.lin."),
    (".modulation.linear.", ".modulation.lin."),
    ("_attn_qkv.", "_attn.qkv."),
    ("_attn_proj.", "_attn.proj."),
    *(
        (f"{theirs}{short}_norm.weight", f"{ours}norm.{long}_norm.{kind}")
        for short, long in (("q", "query"), ("k", "key"))
        for kind in ("scale", "weight")
        for theirs, ours in (("_attn_", "_attn."), ("single_blocks.{}.", "single_blocks.{}."))
    ),
)


def _joined(theirs: str, block: str, parts: tuple[str, ...], squares: bool = False) -> Iterator[Rule]:
    for kind in ("weight", "bias"):
        yield Rule(f"{theirs}.{kind}", tuple(f"{block}.{part}.{kind}" for part in parts), squares=squares)


def _rules(names: set[str]) -> Iterator[Rule]:
    guidance = _GUIDANCE if {_GUIDANCE_MARK, _OUR_GUIDANCE_MARK} & names else {}
    for theirs, ours in {**_ENDS, **guidance}.items():
        yield from affine(theirs, ours)
    yield from affine("final_layer.adaLN_modulation.1", "norm_out.linear", swapped=True)
    for number in range(count_modules(names, _REFINER_MARK, _OUR_REFINER_MARK)):
        block, our_block = REFINER.format(number), OUR_REFINER.format(number)
        yield from _joined(f"{block}.self_attn_qkv", our_block, _QKV)
        for theirs, ours in _REFINER_MODULES.items():
            yield from affine(f"{block}.{theirs}", f"{our_block}.{ours}")
    for number in range(count_modules(names, _DOUBLE_MARK, _OUR_DOUBLE_MARK)):
        block, our_block = DOUBLE.format(number), OUR_DOUBLE.format(number)
        yield from _joined(f"{block}.img_attn_qkv", our_block, _QKV)
        yield from _joined(f"{block}.txt_attn_qkv", our_block, _TEXT_QKV)
        for theirs, ours in _DOUBLE_MODULES.items():
            yield from affine(f"{block}.{theirs}", f"{our_block}.{ours}")
        for theirs, ours in _DOUBLE_NORMS.items():
            yield Rule(f"{block}.{theirs}.weight", (f"{our_block}.attn.{ours}.weight",))
    for number in range(count_modules(names, _SINGLE_MARK, _OUR_SINGLE_MARK)):
        block, our_block = SINGLE.format(number), OUR_SINGLE.format(number)
        yield from _joined(f"{block}.linear1", our_block, (*_QKV, "proj_mlp"), squares=True)
        yield from affine(f"{block}.linear2", f"{our_block}.proj_out")
        yield from affine(f"{block}.modulation.linear", f"{our_block}.norm.linear")
        for name in "qk":
            yield Rule(f"{block}.{name}_norm.weight", (f"{our_block}.attn.norm_{name}.weight",))


def _config(t: Shapes, stated: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of diffusers' HunyuanVideoTransformer3DModel. Only the axes of the rotary angles are stated.

    Raises:
        ValueError: they are not stated, and a head is not as wide as in the published models.
    """
    width, channels, patch_t, patch, _ = t["x_embedder.proj.weight"]
    (head,), names = t["transformer_blocks.0.attn.norm_q.weight"], set(t)
    axes = json.loads(stated["rope_axes_dim"]) if "rope_axes_dim" in stated else list(AXES)
    if sum(axes) != head:
        raise ValueError(
            f"a head is {head} wide, but the axes of its rotary angles, {axes}, sum to {sum(axes)}; add rope_axes_dim "
            "to the file's metadata"
        )
    return {
        "_class_name": "HunyuanVideoTransformer3DModel",
        "in_channels": channels,
        "out_channels": t["proj_out.weight"][0] // (patch_t * patch**2),
        "num_attention_heads": width // head,
        "attention_head_dim": head,
        "num_layers": count_modules(names, "", _OUR_DOUBLE_MARK),
        "num_single_layers": count_modules(names, "", _OUR_SINGLE_MARK),
        "num_refiner_layers": count_modules(names, "", _OUR_REFINER_MARK),
        "mlp_ratio": t["transformer_blocks.0.ff.net.0.proj.weight"][0] / width,
        "patch_size": patch,
        "patch_size_t": patch_t,
        "qk_norm": "rms_norm",
        "guidance_embeds": _OUR_GUIDANCE_MARK in names,
        "text_embed_dim": t["context_embedder.proj_in.weight"][1],
        "pooled_projection_dim": t["time_text_embed.text_embedder.linear_1.weight"][1],
        "rope_theta": 256.0,
        "rope_axes_dim": axes,
    }


_TRANSFORMER = LayoutFile(
    name="hunyuan_video_720_cfgdistill_bf16.safetensors",
    part="transformer",
    prefix="",
    mark=_SINGLE_MARK.format(0),
    diffusers_mark=_OUR_SINGLE_MARK.format(0),
    rules=_rules,
    config=_config,
    blocks=(_DOUBLE_MARK, _SINGLE_MARK, _REFINER_MARK, _GUIDANCE_MARK),
    pickle="hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt",
    prefixes=("model.diffusion_model.", "model.model."),
    spelling=_COMFY,
)
_VAE = LayoutFile(
    name="hunyuan_video_vae_bf16.safetensors",
    part="vae",
    prefix="",
    mark=vae_layout.MARK,
    diffusers_mark=vae_layout.MARK,
    rules=vae_layout.rules,
    config=vae_layout.config,
    pickle="hunyuan-video-t2v-720p/vae/pytorch_model.pt",
    prefixes=("vae.",),
    spelling=vae_layout.COMFY,
    matrices=vae_layout.MATRICES,
)
_LLAMA = LayoutFile(
    name="llava_llama3_fp16.safetensors",
    part="text_encoder",
    prefix="",
    mark=text_layout.LLAMA_MARK,
    diffusers_mark=text_layout.LLAMA_MARK,
    rules=text_layout.llama_rules,
    config=text_layout.llama_config,
    spare=(("lm_head.weight", ""),),
    stem="model",
    prefixes=("model.",),
)
_CLIP = LayoutFile(
    name="clip_l.safetensors",
    part="text_encoder_2",
    prefix="",
    mark=text_layout.CLIP_MARK,
    diffusers_mark=text_layout.CLIP_MARK,
    rules=text_layout.clip_rules,
    config=text_layout.clip_config,
    spare=(("embeddings.position_ids", ""), ("text_projection.weight", ""), ("logit_scale", "")),
    stem="model",
    prefixes=("text_model.",),
)
LAYOUT = Layout(
    name="hunyuan_video",
    files=(_TRANSFORMER, _VAE, _LLAMA, _CLIP),
    in_metadata=IN_METADATA,
    refused={
        r"^(txt_in|context_embedder)\.weight$": "it is a transformer of Flux, which makes pictures",
        r"^(clean_x_embedder|image_projection)\.": "it is a FramePack model; use the text-to-video model",
        r"\.norm1\.gamma$": "it is the VAE of HunyuanVideo 1.5; use HunyuanVideo's own",
    },
    safetensors_at="hunyuanvideo-community/HunyuanVideo",
)
