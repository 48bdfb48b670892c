"""Map genmo's files of Mochi (dit, encoder and decoder.safetensors) to diffusers' names, in both directions.

Two things differ besides names. diffusers splits each qkv in three. diffusers has the two halves of a SwiGLU's first
matrix, and of the last modulation, in the other order. The original scripts, ComfyUI and the published Pusa-V0.5 use
genmo's names.
"""

import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

from pusa.backbones.family import Layout, LayoutFile, Rule, Shapes, affine

# A name that each numbered module has in diffusers' layout: the modules are counted by it.
BLOCK = "blocks.{}.mod_x.weight"  # in genmo's layout
BLOCKS = "transformer_blocks.{}.norm1.linear.weight"
DOWN_BLOCKS = "encoder.down_blocks.{}.conv_in.conv.weight"
UP_BLOCKS = "decoder.up_blocks.{}.proj.weight"
RESNETS = ".resnets.{}.norm1.norm_layer.weight"


def _transformer(names: set[str]) -> Iterator[Rule]:
    yield from affine("x_embedder.proj", "patch_embed.proj")
    for layer, name in ((0, "linear_1"), (2, "linear_2")):
        yield from affine(f"t_embedder.mlp.{layer}", f"time_embed.timestep_embedder.{name}")
    for name in ("to_kv", "to_q", "to_out"):
        yield from affine(f"t5_y_embedder.{name}", f"time_embed.pooler.{name}")
    yield from affine("t5_yproj", "time_embed.caption_proj")
    count = _length(names, BLOCK, 0, BLOCKS)
    for block in range(count):
        yield from _block(f"blocks.{block}", f"transformer_blocks.{block}", last=block == count - 1)
    yield from affine("final_layer.mod", "norm_out.linear", swapped=True)
    yield from affine("final_layer.linear", "proj_out")
    yield Rule("pos_frequencies", ("pos_frequencies",))


def _block(genmo: str, ours: str, last: bool) -> Iterator[Rule]:
    """Yield the rules of a block. The text stream of the last block ends with its attention."""
    yield from affine(f"{genmo}.mod_x", f"{ours}.norm1.linear")
    yield from affine(f"{genmo}.mod_y", f"{ours}.norm1_context.{'linear_1' if last else 'linear'}")
    for stream, names, norms in (
        ("x", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k")),
        ("y", ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k")),
    ):
        yield Rule(f"{genmo}.attn.qkv_{stream}.weight", tuple(f"{ours}.attn1.{name}.weight" for name in names))
        for q_or_k, norm in zip("qk", norms, strict=True):
            yield Rule(f"{genmo}.attn.{q_or_k}_norm_{stream}.weight", (f"{ours}.attn1.{norm}.weight",))
    yield from affine(f"{genmo}.attn.proj_x", f"{ours}.attn1.to_out.0")
    if not last:
        yield from affine(f"{genmo}.attn.proj_y", f"{ours}.attn1.to_add_out")
    for stream, name in (("x", "ff"),) if last else (("x", "ff"), ("y", "ff_context")):
        yield Rule(f"{genmo}.mlp_{stream}.w1.weight", (f"{ours}.{name}.net.0.proj.weight",), swapped=True)
        yield Rule(f"{genmo}.mlp_{stream}.w2.weight", (f"{ours}.{name}.net.2.weight",))


def _encoder(names: set[str]) -> Iterator[Rule]:
    """Yield the rules. genmo numbers all stages in one list: first convolution, resnets, down blocks, resnets."""
    yield from affine("layers.0", "encoder.proj_in")
    place = 1
    for resnet in range(_length(names, "layers.{}.stack.0.weight", place, "encoder.block_in" + RESNETS)):
        yield from _resnet(names, f"layers.{place}", "encoder.block_in", resnet)
        place += 1
    for down in range(_length(names, "layers.{}.layers.0.weight", place, DOWN_BLOCKS)):
        theirs, ours = f"layers.{place}.layers", f"encoder.down_blocks.{down}"
        yield from affine(f"{theirs}.0", f"{ours}.conv_in.conv")
        for resnet in range(_length(names, f"{theirs}.{{}}.stack.0.weight", 1, ours + RESNETS)):
            yield from _resnet(names, f"{theirs}.{resnet + 1}", ours, resnet)
        place += 1
    for resnet in range(_length(names, "layers.{}.stack.0.weight", place, "encoder.block_out" + RESNETS)):
        yield from _resnet(names, f"layers.{place + resnet}", "encoder.block_out", resnet)
    yield from affine("output_norm", "encoder.norm_out.norm_layer")
    yield Rule("output_proj.weight", ("encoder.proj_out.weight",))


def _decoder(names: set[str]) -> Iterator[Rule]:
    yield from affine("blocks.0.0", "decoder.conv_in")
    for resnet in range(_length(names, "blocks.0.{}.stack.0.weight", 1, "decoder.block_in" + RESNETS)):
        yield from _resnet(names, f"blocks.0.{resnet + 1}", "decoder.block_in", resnet)
    ups = _length(names, "blocks.{}.proj.weight", 1, UP_BLOCKS)
    for up in range(ups):
        theirs, ours = f"blocks.{up + 1}", f"decoder.up_blocks.{up}"
        for resnet in range(_length(names, f"{theirs}.blocks.{{}}.stack.0.weight", 0, ours + RESNETS)):
            yield from _resnet(names, f"{theirs}.blocks.{resnet}", ours, resnet)
        yield from affine(f"{theirs}.proj", f"{ours}.proj")
    last = f"blocks.{ups + 1}"
    for resnet in range(_length(names, f"{last}.{{}}.stack.0.weight", 0, "decoder.block_out" + RESNETS)):
        yield from _resnet(names, f"{last}.{resnet}", "decoder.block_out", resnet)
    yield from affine("output_proj", "decoder.proj_out")


def _resnet(names: set[str], genmo: str, stage: str, number: int) -> Iterator[Rule]:
    """Yield the rules of a residual block and its attention, which genmo keeps inside it and diffusers beside it."""
    ours = f"{stage}.resnets.{number}"
    for place, name in ((0, "norm1.norm_layer"), (2, "conv1.conv"), (3, "norm2.norm_layer"), (5, "conv2.conv")):
        yield from affine(f"{genmo}.stack.{place}", f"{ours}.{name}")
    attention = f"{stage}.attentions.{number}"
    if {f"{genmo}.attn_block.norm.weight", f"{attention}.to_q.weight"} & names:
        split = tuple(f"{attention}.{name}.weight" for name in ("to_q", "to_k", "to_v"))
        yield Rule(f"{genmo}.attn_block.attn.qkv.weight", split)
        yield from affine(f"{genmo}.attn_block.attn.out", f"{attention}.to_out.0")
        yield from affine(f"{genmo}.attn_block.norm", f"{stage}.norms.{number}.norm_layer")


def _length(names: set[str], genmo: str, first: int, ours: str) -> int:
    """Return how many modules `names` has in either layout: genmo numbers them from `first`, diffusers from 0."""
    return max(_count(names, genmo, first), _count(names, ours))


def _count(names: set[str], pattern: str, first: int = 0) -> int:
    """Return the number of consecutive names, starting with `first` in place of {}."""
    return next(i for i in itertools.count() if pattern.format(first + i) not in names)


def _transformer_config(t: Shapes, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of diffusers' MochiTransformer3DModel, read from names and shapes."""
    patch = t["patch_embed.proj.weight"][-1]
    caption = t["time_embed.caption_proj.weight"]
    return {
        "_class_name": "MochiTransformer3DModel",
        "patch_size": patch,
        "num_attention_heads": t["pos_frequencies"][1],
        "attention_head_dim": t["transformer_blocks.0.attn1.norm_q.weight"][0],
        "num_layers": _count(set(t), BLOCKS),
        "pooled_projection_dim": caption[0],
        "in_channels": t["patch_embed.proj.weight"][1],
        "out_channels": t["proj_out.weight"][0] // patch**2,
        "text_embed_dim": caption[1],
        "time_embed_dim": t["time_embed.timestep_embedder.linear_1.weight"][1],
    }


STATISTICS = ("latents_mean", "latents_std")


def _encoder_config(t: Shapes, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the encoder's share of AutoencoderKLMochi's arguments.

    genmo keeps the latents' statistics in its code, not in its files. Where the metadata does not give others, the
    defaults of the class apply, which are Mochi's own.
    """
    names = set(t)
    count = _count(names, DOWN_BLOCKS)
    downs = [t[f"encoder.down_blocks.{down}.conv_in.conv.weight"] for down in range(count)]
    stages = ["encoder.block_in", *(f"encoder.down_blocks.{i}" for i in range(count)), "encoder.block_out"]
    return {
        "_class_name": "AutoencoderKLMochi",
        "in_channels": t["encoder.proj_in.weight"][1],
        "encoder_block_out_channels": [t["encoder.proj_in.weight"][0], *(shape[0] for shape in downs)],
        "layers_per_block": [_count(names, stage + RESNETS) for stage in stages],
        "temporal_expansions": [shape[2] for shape in downs],
        "spatial_expansions": [shape[3] for shape in downs],
        "add_attention_block": [f"{stage}.attentions.0.to_q.weight" in names for stage in stages],
        **{name: json.loads(metadata[name]) for name in STATISTICS if name in metadata},
    }


def _decoder_config(t: Shapes, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the decoder's share of AutoencoderKLMochi's arguments."""
    ups = range(_count(set(t), UP_BLOCKS))
    wide_to_narrow = [t[f"decoder.up_blocks.{up}.proj.weight"][1] for up in ups]
    return {
        "_class_name": "AutoencoderKLMochi",
        "out_channels": t["decoder.proj_out.weight"][0],
        "latent_channels": t["decoder.conv_in.weight"][1],
        "decoder_block_out_channels": [t["decoder.proj_out.weight"][1], *reversed(wide_to_narrow)],
    }


LAYOUT = Layout(
    name="genmo",
    files=(
        LayoutFile(
            name="dit.safetensors",
            part="transformer",
            prefix="",
            mark="t5_yproj.weight",
            diffusers_mark="time_embed.caption_proj.weight",
            rules=_transformer,
            config=_transformer_config,
            blocks=(BLOCK,),
            prefixes=("model.diffusion_model.",),  # written by ComfyUI before every name
        ),
        LayoutFile(
            name="encoder.safetensors",
            part="vae",
            prefix="encoder.",
            mark="layers.0.weight",
            diffusers_mark="encoder.proj_in.weight",
            rules=_encoder,
            config=_encoder_config,
        ),
        LayoutFile(
            name="decoder.safetensors",
            part="vae",
            prefix="decoder.",
            mark="blocks.0.0.weight",
            diffusers_mark="decoder.proj_out.weight",
            rules=_decoder,
            config=_decoder_config,
        ),
    ),
    in_metadata=STATISTICS,
)
