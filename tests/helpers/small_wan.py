"""Small random models of the three Wan families, written in diffusers' layout by diffusers' own classes."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from pusa.system.files import write_json
from pusa.tiny.training import new_tokenizer

TEXT_WIDTH, MAX_TOKENS = 16, 512
# The width of a head, 24, leaves an even number of rotary angles for each axis: 8, 8 and 8.
TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "num_layers": 2,
    "ffn_dim": 64,
    "freq_dim": 32,
    "text_dim": TEXT_WIDTH,
}
VAE = {"base_dim": 8, "dim_mult": [1, 1, 2, 2], "num_res_blocks": 1}
# TI2V-5B's VAE: shortcuts, and patches of 2 x 2 pixels, so that it compresses 16 times.
VAE_5B = {
    **VAE,
    "decoder_base_dim": 8,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [0.1 * (i % 5) for i in range(48)],
    "latents_std": [1 + 0.1 * (i % 3) for i in range(48)],
}


def write_wan_2_1(folder: Path, seed: int = 0) -> Path:
    """Write a small Wan 2.1: one transformer of 16 channels. Return the folder."""
    return _write(folder, {"transformer": TRANSFORMER}, VAE, {}, seed)


def write_wan_2_2_a14b(folder: Path, seed: int = 0, boundary: float | None = 0.875) -> Path:
    """Write a small Wan 2.2 A14B: two different experts. Without a boundary, its index has null there."""
    experts = {"transformer": TRANSFORMER, "transformer_2": TRANSFORMER}
    return _write(folder, experts, VAE, {"boundary_ratio": boundary, "expand_timesteps": False}, seed)


def write_wan_2_2_5b(folder: Path, seed: int = 0) -> Path:
    """Write a small Wan 2.2 5B: 48 channels, and a VAE that compresses 16 times in space."""
    transformer = {**TRANSFORMER, "in_channels": 48, "out_channels": 48}
    return _write(folder, {"transformer": transformer}, VAE_5B, {"expand_timesteps": True}, seed)


def new_wan_transformer(seed: int, **settings: object) -> WanTransformer3DModel:
    """Return diffusers' transformer with random weights, all of which count."""
    torch.manual_seed(seed)
    model = WanTransformer3DModel(**{**TRANSFORMER, **settings})
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:  # biases start as 0 and norms as 1, which would hide what is left out
                weight.add_(torch.randn_like(weight), alpha=0.1)
            elif "proj_out" in name:
                weight.mul_(2)
    return model.eval()


def _write(
    folder: Path,
    transformers: dict[str, dict[str, object]],
    vae: dict[str, object],
    index: dict[str, object],
    seed: int,
) -> Path:
    for number, (part, settings) in enumerate(transformers.items()):
        new_wan_transformer(seed + number, **settings).save_pretrained(folder / part)
    torch.manual_seed(seed)
    AutoencoderKLWan(**vae).save_pretrained(folder / "vae")
    tokenizer = new_tokenizer(MAX_TOKENS)
    tokenizer.save_pretrained(folder / "tokenizer")
    config = UMT5Config(vocab_size=len(tokenizer), d_model=TEXT_WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
    FlowMatchEulerDiscreteScheduler(shift=5.0).save_pretrained(folder / "scheduler")
    parts = {
        **{part: ["diffusers", "WanTransformer3DModel"] for part in transformers},
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    write_json(folder / "model_index.json", {"_class_name": "WanPipeline", **parts, **index})
    return folder
