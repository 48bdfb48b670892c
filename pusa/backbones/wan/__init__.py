"""Wan 2.1 (1.3B, 14B) and Wan 2.2 (A14B with two experts, 5B) by Alibaba; one network, three families.

`builtin:tiny-wan` is a Wan 2.1 at tiny size.
"""

from dataclasses import replace

from pusa.backbones.family import Family, Geometry, JobDefaults, Preset, RecipeDefaults, import_lazily
from pusa.backbones.wan.layout import LAYOUT, LAYOUT_5B, LAYOUT_A14B

# The published English form of Wan's own negative prompt, which Pusa V1.0's scripts use.
NEGATIVE_PROMPT = (
    "Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, images, static, overall "
    "gray, worst quality, low quality, JPEG compression residue, ugly, incomplete, extra fingers, poorly drawn hands, "
    "poorly drawn faces, deformed, disfigured, misshapen limbs, fused fingers, still picture, messy background, three "
    "legs, many people in the background, walking backwards"
)

WAN_2_1 = Family(
    name="wan2.1",
    backbone="pusa.backbones.wan.backbone:Wan",
    geometry=Geometry(spatial=8, temporal=4, patch=2, channels=16),
    # Pusa V1.0's settings; Wan 2.1's own frame rate.
    job=JobDefaults(
        width=832,
        height=480,
        num_frames=81,
        fps=16,
        steps=30,
        guidance=3,
        noise_schedule="shifted",
        negative_prompt=NEGATIVE_PROMPT,
    ),
    recipe=RecipeDefaults(
        density="shifted", lora_targets=("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
    ),
    # Pusa V1.0's examples. Keyframes: {0: 0.2, 20: 0.5}. "wan" extends as a caption of its gallery says, "wan2.1" as
    # its scripts do.
    presets={
        "wan": Preset(0.2, (0.2, 0.5), (0.3, 0.8), (0.0, 0.3, 0.5, 0.7)),
        "wan2.1": Preset(0.2, (0.2, 0.5), (0.3, 0.8), (0.0, 0.3, 0.4, 0.5)),
    },
    preset="wan2.1",
    layout=LAYOUT,
    sizes={"1.3B": 1_418_996_800, "14B": 14_288_491_584},
    latent_spaces=("dit",),
    marks={
        "wan": r"blocks\.\d+\.(self_attn|cross_attn)\.|condition_embedder\.",
    },
    pipeline="WanPipeline",
    tiny="builtin:tiny-wan",
    tiny_recipe="pusa.backbones.wan.tiny:RECIPE",
)
WAN_2_2_A14B = replace(
    WAN_2_1,
    name="wan2.2-a14b",
    # The examples of Pusa for Wan 2.2.
    presets={"wan2.2": Preset(0.2, (0.2, 0.5), (0.3, 0.8), (0.2, 0.4, 0.4, 0.4))},
    preset="wan2.2",
    layout=LAYOUT_A14B,
    sizes={"14B": 14_288_491_584},
    transformers=("transformer", "transformer_2"),
    experts={"high": "transformer", "low": "transformer_2"},
    boundary=0.875,
    tiny="",
    tiny_recipe="",
)
WAN_2_2_5B = replace(
    WAN_2_1,
    name="wan2.2-5b",
    geometry=Geometry(spatial=16, temporal=4, patch=2, channels=48),
    # The model's own settings: no Pusa was published for it.
    job=replace(WAN_2_1.job, width=1280, height=704, num_frames=121, fps=24, steps=50, guidance=5),
    presets=WAN_2_2_A14B.presets,
    preset=WAN_2_2_A14B.preset,
    layout=LAYOUT_5B,
    sizes={"5B": 4_999_787_712},
    tiny="",
    tiny_recipe="",
)

__getattr__ = import_lazily(
    __name__,
    {
        "Wan": "pusa.backbones.wan.backbone",
        "PusaWanTransformer3DModel": "pusa.backbones.wan.transformer",
        "PusaAutoencoderKLWan": "pusa.backbones.wan.vae",
    },
)
