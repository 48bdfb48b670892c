"""HunyuanVideo by Tencent: 13B parameters, 1280x720, 129 frames; and `builtin:tiny-hunyuan`, the same classes tiny."""

from pusa.backbones.family import Family, Geometry, JobDefaults, Preset, RecipeDefaults, import_lazily
from pusa.backbones.hunyuan_video.layout import LAYOUT

FAMILY = Family(
    name="hunyuan_video",
    backbone="pusa.backbones.hunyuan_video.backbone:HunyuanVideo",
    geometry=Geometry(spatial=8, temporal=4, patch=2, channels=16),
    # The model's own settings. It was distilled with its guidance, and needs no null pass.
    job=JobDefaults(
        width=1280,
        height=720,
        num_frames=129,
        fps=24,
        steps=50,
        guidance=1,
        noise_schedule="shifted(7)",
        embedded_guidance=6,
    ),
    recipe=RecipeDefaults(
        density="shifted",
        # Attention and MLP of the blocks of both kinds; the refiner and the last projection have layers named alike.
        lora_targets=(
            "*transformer_blocks.*.attn.*",
            "transformer_blocks.*.ff*.net.*",
            "single_transformer_blocks.*.proj_*",
        ),
        embedded_guidance=1,  # its training target has no guidance in it
    ),
    # No Pusa was published for it: the multipliers are those of Pusa V1.0's examples for Wan 2.1.
    presets={"hunyuan": Preset(0.2, (0.2, 0.5), (0.3, 0.8), (0.0, 0.3, 0.4, 0.5))},
    preset="hunyuan",
    # The original's tiles: pixels a side, and frames.
    latent_settings={"tile": 256, "tile_stride": 192, "tile_frames": 64, "tile_frames_stride": 48},
    layout=LAYOUT,
    sizes={"13B": 12_821_012_544},
    latent_spaces=("dit",),
    marks={
        "hunyuan_video": r"single_blocks[._]|double_blocks\.\d+\.\w+_attn_qkv|single_transformer_blocks\..*proj_mlp",
    },
    text_encoders=("text_encoder", "text_encoder_2"),
    tokenizers=("tokenizer", "tokenizer_2"),
    vocabularies=("tokenizer.json", "vocab.json"),
    pipeline="HunyuanVideoPipeline",
    tiny="builtin:tiny-hunyuan",
    tiny_recipe="pusa.backbones.hunyuan_video.tiny:RECIPE",
)

__getattr__ = import_lazily(
    __name__,
    {
        "HunyuanVideo": "pusa.backbones.hunyuan_video.backbone",
        "PusaHunyuanVideoTransformer3DModel": "pusa.backbones.hunyuan_video.transformer",
        "PusaAutoencoderKLHunyuanVideo": "pusa.backbones.hunyuan_video.vae",
        "PusaLlamaModel": "pusa.backbones.hunyuan_video.text",
    },
)
