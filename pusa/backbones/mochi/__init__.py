"""Mochi 1 by genmo: 10B parameters, 848x480, 163 frames; and `builtin:tiny`, the same classes at tiny size."""

from pusa.backbones.family import Family, Geometry, JobDefaults, Preset, RecipeDefaults, import_lazily
from pusa.backbones.mochi.layout import LAYOUT

FAMILY = Family(
    name="mochi",
    backbone="pusa.backbones.mochi.backbone:Mochi",
    geometry=Geometry(spatial=8, temporal=6, patch=2, channels=12),
    job=JobDefaults(
        width=848, height=480, num_frames=163, fps=24, steps=64, guidance=4.5, noise_schedule="linear_quadratic"
    ),
    recipe=RecipeDefaults(density="linear_quadratic", lora_targets=("to_q", "to_k", "to_v", "to_out.0")),
    presets={
        # Pusa V0.5's examples. Keyframes: {0: 0.3, 20: 0.7} and {0: 0.3, 13: 0.7, 27: 0.7}. Image to video: 0 to 0.4.
        "mochi": Preset(0.2, (0.3, 0.7), (0.3, 0.8), (0.1, 0.2, 0.3, 0.4)),
    },
    preset="mochi",
    layout=LAYOUT,
    marks={
        "mochi": r"attn\.qkv_x|attn1\.add_q_proj|t5_yproj",
        "mochi vae": r"^encoder\.proj_in\.|^decoder\.up_blocks\.\d+\.proj\.|\.stack\.\d\.",
        "t5": r"SelfAttention\.relative_attention_bias",
    },
    pipeline="MochiPipeline",
    tiny="builtin:tiny",
    tiny_recipe="pusa.backbones.mochi.tiny:RECIPE",
)

__getattr__ = import_lazily(
    __name__,
    {
        "Mochi": "pusa.backbones.mochi.backbone",
        "PusaMochiTransformer3DModel": "pusa.backbones.mochi.transformer",
        "PusaAutoencoderKLMochi": "pusa.backbones.mochi.vae",
    },
)
