"""Map the original names of Wan's two VAEs to diffusers' names, and read their settings from their shapes."""

import itertools
import json
from collections.abc import Iterator, Mapping
from math import isqrt
from typing import Any

from pusa.backbones.family import Rule, Shapes, affine, count_modules


def plain_rules(names: set[str]) -> Iterator[Rule]:
    """Yield the rules of Wan 2.1's VAE. The original numbers the modules of all stages of a half in one list."""
    yield from _vae_ends(names)
    for place in itertools.count():
        theirs, ours = f"encoder.downsamples.{place}", f"encoder.down_blocks.{place}"
        module = list(_resnet(names, theirs, ours)) or list(_resample(names, theirs, ours))
        if not module:
            break
        yield from module
    place = 0
    for stage in itertools.count():
        modules: list[Rule] = []
        for resnet in itertools.count():
            theirs, ours = f"decoder.upsamples.{place}", f"decoder.up_blocks.{stage}.resnets.{resnet}"
            rules = list(_resnet(names, theirs, ours))
            if not rules:
                break
            modules += rules
            place += 1
        upsampler = list(_resample(names, f"decoder.upsamples.{place}", f"decoder.up_blocks.{stage}.upsamplers.0"))
        yield from modules + upsampler
        if not upsampler:  # the last stage has none
            break
        place += 1


def residual_rules(names: set[str]) -> Iterator[Rule]:
    """Yield the rules of Wan 2.2's VAE. The shortcuts around its stages have no weights."""
    yield from _vae_ends(names)
    for their_half, our_half, sampler in (
        ("encoder.downsamples.{}.downsamples", "encoder.down_blocks.{}", "downsampler"),
        ("decoder.upsamples.{}.upsamples", "decoder.up_blocks.{}", "upsampler"),
    ):
        for stage in itertools.count():
            theirs, ours = their_half.format(stage), our_half.format(stage)
            place = 0
            while rules := list(_resnet(names, f"{theirs}.{place}", f"{ours}.resnets.{place}")):
                yield from rules
                place += 1
            yield from _resample(names, f"{theirs}.{place}", f"{ours}.{sampler}")
            if not place:
                break


def _vae_ends(names: set[str]) -> Iterator[Rule]:
    yield from affine("conv1", "quant_conv")
    yield from affine("conv2", "post_quant_conv")
    for half in ("encoder", "decoder"):
        yield from affine(f"{half}.conv1", f"{half}.conv_in")
        for theirs, ours in ((0, 0), (2, 1)):
            yield from _resnet(names, f"{half}.middle.{theirs}", f"{half}.mid_block.resnets.{ours}", always=True)
        theirs_attention, ours_attention = f"{half}.middle.1", f"{half}.mid_block.attentions.0"
        yield Rule(f"{theirs_attention}.norm.gamma", (f"{ours_attention}.norm.gamma",))
        for name in ("to_qkv", "proj"):
            yield from affine(f"{theirs_attention}.{name}", f"{ours_attention}.{name}")
        yield Rule(f"{half}.head.0.gamma", (f"{half}.norm_out.gamma",))
        yield from affine(f"{half}.head.2", f"{half}.conv_out")


def _resnet(names: set[str], theirs: str, ours: str, always: bool = False) -> Iterator[Rule]:
    """Yield the rules of a residual block if `names` has one there, or `always`."""
    if not (always or {f"{theirs}.residual.2.weight", f"{ours}.conv1.weight"} & names):
        return
    for place, norm in ((0, "norm1"), (3, "norm2")):
        yield Rule(f"{theirs}.residual.{place}.gamma", (f"{ours}.{norm}.gamma",))
    for place, convolution in ((2, "conv1"), (6, "conv2")):
        yield from affine(f"{theirs}.residual.{place}", f"{ours}.{convolution}")
    if {f"{theirs}.shortcut.weight", f"{ours}.conv_shortcut.weight"} & names:
        yield from affine(f"{theirs}.shortcut", f"{ours}.conv_shortcut")


def _resample(names: set[str], theirs: str, ours: str) -> Iterator[Rule]:
    """Yield the rules of a change of resolution, in space and perhaps in time, if `names` has one there."""
    for module in ("resample.1", "time_conv"):
        if {f"{theirs}.{module}.weight", f"{ours}.{module}.weight"} & names:
            yield from affine(f"{theirs}.{module}", f"{ours}.{module}")


STATISTICS = ("latents_mean", "latents_std")
# By latent channels: of Wan 2.1's VAE and of Wan 2.2's. The authors keep them in their code.
# fmt: off
_PUBLISHED = {
    16: (
        [-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
         0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921],
        [2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
         3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160],
    ),
    48: (
        [-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
         0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
         -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
         -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667],
        [0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
         0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
         0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
         0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744],
    ),
}
# fmt: on


def config(t: Shapes, stated: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of diffusers' AutoencoderKLWan.

    Raises:
        ValueError: no statistics of the latents are known, neither stated nor published for the number of channels.
    """
    is_residual = "encoder.down_blocks.0.resnets.0.conv1.weight" in t
    stages = _residual_stages(t) if is_residual else _plain_stages(t)
    base, channels = t["encoder.conv_in.weight"][0], t["post_quant_conv.weight"][0]
    multiples = [width // base for width, _, _ in stages]
    decoder_base = t["decoder.conv_in.weight"][0] // multiples[-1]
    patch = isqrt(t["encoder.conv_in.weight"][1] // 3)
    temporal = [down_in_time for _, _, down_in_time in stages[:-1]]
    statistics = dict(zip(STATISTICS, _PUBLISHED.get(channels, ()), strict=False))
    statistics |= {name: json.loads(stated[name]) for name in STATISTICS if name in stated}
    if len(statistics) < len(STATISTICS):
        raise ValueError(f"mean and deviation of latents of {channels} channels are not known; the file states none")
    return {
        "_class_name": "AutoencoderKLWan",
        "base_dim": base,
        **({"decoder_base_dim": decoder_base} if decoder_base != base else {}),
        "z_dim": channels,
        "dim_mult": multiples,
        "num_res_blocks": stages[0][1],
        "attn_scales": [],
        "temperal_downsample": temporal,
        **statistics,
        "is_residual": is_residual,
        "in_channels": t["encoder.conv_in.weight"][1],
        "out_channels": t["decoder.conv_out.weight"][0],
        **({"patch_size": patch} if patch > 1 else {}),
        "scale_factor_temporal": 2 ** sum(temporal),
        "scale_factor_spatial": 2 ** len(temporal) * patch,
    }


def _residual_stages(t: Shapes) -> list[tuple[int, int, bool]]:
    """Return width, number of residual blocks, and whether it halves time, of each stage of the encoder."""
    stages = []
    for stage in range(count_modules(set(t), "", "encoder.down_blocks.{}.resnets.0.conv1.weight")):
        place = f"encoder.down_blocks.{stage}"
        count = count_modules(set(t), "", place + ".resnets.{}.conv1.weight")
        width = t[f"{place}.resnets.0.conv1.weight"][0]
        stages.append((width, count, f"{place}.downsampler.time_conv.weight" in t))
    return stages


def _plain_stages(t: Shapes) -> list[tuple[int, int, bool]]:
    """Return the same of an encoder whose modules are in one list; each change of resolution ends a stage."""
    stages, width, count = [], 0, 0
    for place in itertools.count():
        module = f"encoder.down_blocks.{place}"
        if f"{module}.conv1.weight" in t:
            width, count = t[f"{module}.conv1.weight"][0], count + 1
        elif f"{module}.resample.1.weight" in t:
            stages.append((width, count, f"{module}.time_conv.weight" in t))
            count = 0
        else:
            return [*stages, (width, count, False)]
    raise AssertionError("itertools.count ends")
