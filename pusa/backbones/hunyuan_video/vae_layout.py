"""List the tensors of HunyuanVideo's VAE, in the names of its authors and of ComfyUI, and read settings from shapes.

diffusers kept the authors' names. Not all settings show in the shapes; what differs from the published VAE is in the
file's metadata.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pusa.backbones.family import Rule, Shapes, affine, count_modules

STAGES = 4
MARK = "encoder.down_blocks.0.downsamplers.0.conv.conv.weight"
IN_METADATA = ("scaling_factor", "norm_num_groups")
_RESNETS = "{}.resnets.{{}}.conv1.conv.weight"
# ComfyUI's names are those of the first latent diffusion models, whose decoder counts its stages from the output.
COMFY = (
    ("encoder.down_blocks.{}.resnets.{}.", "encoder.down.{}.block.{}."),
    ("encoder.down_blocks.{}.downsamplers.0.", "encoder.down.{}.downsample."),
    *(
        (f"decoder.up_blocks.{stage}.{ours}", f"decoder.up.{STAGES - 1 - stage}.{theirs}")
        for stage in range(STAGES)
        for ours, theirs in (("resnets.{}.", "block.{}."), ("upsamplers.0.", "upsample."))
    ),
    ("mid_block.resnets.0.", "mid.block_1."),
    ("mid_block.resnets.1.", "mid.block_2."),
    *(
        (f"mid_block.attentions.0.{ours}.", f"mid.attn_1.{theirs}.")
        for ours, theirs in (
            ("group_norm", "norm"),
            ("to_q", "q"),
            ("to_k", "k"),
            ("to_v", "v"),
            ("to_out.0", "proj_out"),
        )
    ),
    ("conv_shortcut.", "nin_shortcut."),
    ("coder.conv_norm_out.", "coder.norm_out."),
)
MATRICES = r".*\.attentions\.0\.to_\w+(\.0)?\.weight"


def rules(names: set[str]) -> Iterator[Rule]:
    """Yield the rules of all tensors, which have the same name in both layouts."""
    for module in _modules(names):
        yield from affine(module, module)


def _modules(names: set[str]) -> Iterator[str]:
    yield from ("quant_conv", "post_quant_conv")
    for half, stage_name, sampler in (
        ("encoder", "encoder.down_blocks.{}", "downsamplers"),
        ("decoder", "decoder.up_blocks.{}", "upsamplers"),
    ):
        yield from (f"{half}.conv_in.conv", f"{half}.conv_norm_out", f"{half}.conv_out.conv")
        for number in range(STAGES):
            stage = stage_name.format(number)
            yield from _resnets(names, stage)
            if f"{stage}.{sampler}.0.conv.conv.weight" in names:  # the last stage has none
                yield f"{stage}.{sampler}.0.conv.conv"
        yield from _resnets(names, f"{half}.mid_block")
        if f"{half}.mid_block.attentions.0.to_q.weight" in names:
            for name in ("group_norm", "to_q", "to_k", "to_v", "to_out.0"):
                yield f"{half}.mid_block.attentions.0.{name}"


def _resnets(names: set[str], stage: str) -> Iterator[str]:
    pattern = _RESNETS.format(stage)
    for number in range(max(1, count_modules(names, pattern, pattern))):
        resnet = f"{stage}.resnets.{number}"
        for name in ("norm1", "conv1.conv", "norm2", "conv2.conv"):
            yield f"{resnet}.{name}"
        if f"{resnet}.conv_shortcut.conv.weight" in names:
            yield f"{resnet}.conv_shortcut.conv"


def config(t: Shapes, stated: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of diffusers' AutoencoderKLHunyuanVideo."""
    resnets = _RESNETS.format("encoder.down_blocks.0")
    return {
        "_class_name": "AutoencoderKLHunyuanVideo",
        "in_channels": t["encoder.conv_in.conv.weight"][1],
        "out_channels": t["decoder.conv_out.conv.weight"][0],
        "latent_channels": t["post_quant_conv.weight"][0],
        "block_out_channels": [
            t[_RESNETS.format(f"encoder.down_blocks.{stage}").format(0)][0] for stage in range(STAGES)
        ],
        "layers_per_block": count_modules(set(t), resnets, resnets),
        "mid_block_add_attention": "encoder.mid_block.attentions.0.to_q.weight" in t,
        **{"norm_num_groups": 32, "scaling_factor": 0.476986},
        **{name: json.loads(stated[name]) for name in IN_METADATA if name in stated},
    }
