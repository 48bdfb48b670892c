"""Build HunyuanVideo's classes at tiny size: for 64x64 pixels, 29 frames, and captions of a few known words.

Shapes: x_BCTHW pixels in [-1, 1], z_BCFhw latents (F = 1 + (T - 1) / 4, h = H / 8, w = W / 8).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler, HunyuanVideoTransformer3DModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

from pusa.backbones.hunyuan_video.text import CLIP_TOKENS, TEMPLATE, UNUSED_LAYERS, count_template
from pusa.backbones.hunyuan_video.transformer import PusaHunyuanVideoTransformer3DModel
from pusa.backbones.hunyuan_video.vae import PusaAutoencoderKLHunyuanVideo
from pusa.backbones.tiny_recipe import TEXT_WIDTH, Effort, TinyRecipe, Tokens, VaePhase
from pusa.diffusion.sampler import TextFeatures

MAX_TOKENS, TEMPLATE_TOKENS = 16, 99
END = 1  # the token after each caption, as `pusa.tiny.training.new_tokenizer` numbers it
POOLED_WIDTH = 32
TRANSFORMER = {
    "num_attention_heads": 4,
    "attention_head_dim": 28,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "mlp_ratio": 3.0,
    "text_embed_dim": TEXT_WIDTH,
    "pooled_projection_dim": POOLED_WIDTH,
    "rope_axes_dim": (4, 12, 12),
}
LLAMA = {
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": END,
}
CLIP = {
    "hidden_size": POOLED_WIDTH,
    "intermediate_size": 64,
    "projection_dim": POOLED_WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": CLIP_TOKENS,  # diffusers' pipeline pads to this length; captions use 16
    "pad_token_id": 0,
    "bos_token_id": END,
    "eos_token_id": END,
}
VAE = {
    "block_out_channels": (16, 16, 32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 16,
    "scaling_factor": 1.0,
}
START_LOGVAR = -4.0
BRANCH_SCALE = 0.1  # of what residual blocks add at the start
SHARP: dict[str, Any] = {"learning_rate": 2e-3, "noise": 0.12, "absolute": 0.3, "autocast": True}  # later phases
WINDOWS = ((4, 13), (2, None))
GUIDANCE = (1.0, 8.0)  # the numbers that the base model is given while it is trained


def new_transformer() -> PusaHunyuanVideoTransformer3DModel:
    """Build an untrained transformer. It predicts 0."""
    model = PusaHunyuanVideoTransformer3DModel(**TRANSFORMER)
    with torch.no_grad():
        model.proj_out.weight.zero_()
        model.proj_out.bias.zero_()
    return model


def new_llama(vocabulary: int) -> LlamaModel:
    """Build an untrained Llama of four layers, of which two are used; it learns together with the transformer."""
    return LlamaModel(LlamaConfig(vocab_size=vocabulary, **LLAMA))


def new_clip(vocabulary: int) -> CLIPTextModel:
    """Build CLIP's text encoder of two layers, which learns together with the transformer."""
    return CLIPTextModel(CLIPTextConfig(vocab_size=vocabulary, **CLIP))


def tokenize(tokenizer: Any, captions: Sequence[str]) -> Tokens:
    """Return the tokens of N captions: in Llama's template, and plain for CLIP; and those of the empty prompt."""
    cut = count_template(tokenizer)
    assert cut == TEMPLATE_TOKENS, cut
    texts = [*captions, ""]

    def pad(texts: Sequence[str], length: int) -> Any:
        return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")

    llama, clip = pad([TEMPLATE.format(text) for text in texts], cut + MAX_TOKENS), pad(texts, MAX_TOKENS)
    parts = {"ids": llama.input_ids, "mask": llama.attention_mask.bool(), "clip": clip.input_ids}
    captioned = {name: part[:-1] for name, part in parts.items()}
    return captioned | {f"null_{name}": part[-1:].expand(len(captions), -1) for name, part in parts.items()}


def encode_text(encoders: Mapping[str, Any], tokens: Tokens, kept_B: Tensor) -> TextFeatures:
    """Return Llama's features (B, L, width) of tokens and CLIP's pooled ones; of the empty prompt where not kept."""
    ids, mask, clip = (
        torch.where(kept_B[:, None], tokens[name], tokens[f"null_{name}"]) for name in ("ids", "mask", "clip")
    )
    states = encoders["text_encoder"](
        ids, attention_mask=mask, use_cache=False, output_hidden_states=True
    ).hidden_states
    features, mask = states[-1 - UNUSED_LAYERS][:, TEMPLATE_TOKENS:], mask[:, TEMPLATE_TOKENS:]
    return TextFeatures(features * mask[..., None], mask, encoders["text_encoder_2"](clip).pooler_output)


def predict(
    transformer: HunyuanVideoTransformer3DModel, z_BCFhw: Tensor, sigma_B: Tensor, text: TextFeatures
) -> Tensor:
    """Predict the velocity x0 - eps from one level for each clip, as the base model does.

    The embedded guidance is drawn at random: the tiny model is not distilled, and learns to disregard it.
    """
    low, high = GUIDANCE
    velocity: Tensor = transformer(
        hidden_states=z_BCFhw,
        timestep=1000 * sigma_B,
        encoder_hidden_states=text.features,
        encoder_attention_mask=text.mask,
        pooled_projections=text.pooled,
        guidance=1000 * (low + (high - low) * torch.rand(len(z_BCFhw))),
    ).sample
    return -velocity


def new_vae(_: Tensor) -> PusaAutoencoderKLHunyuanVideo:
    """Build an untrained VAE whose residual blocks add little."""
    vae = PusaAutoencoderKLHunyuanVideo(**VAE)
    with torch.no_grad():
        for name, module in vae.named_modules():
            if name.endswith("conv2.conv"):
                module.weight.mul_(BRANCH_SCALE)
                module.bias.zero_()
        channels = VAE["latent_channels"]
        vae.quant_conv.weight[channels:].mul_(BRANCH_SCALE)
        vae.quant_conv.bias[channels:].add_(START_LOGVAR)
    return vae


def statistics(z_BCFhw: Tensor) -> dict[str, Any]:
    """Return the factor by which latents get deviation 1."""
    return {"scaling_factor": 1 / z_BCFhw.std().item()}


RECIPE = TinyRecipe(
    new_vae=new_vae,
    new_transformer=new_transformer,
    new_text_encoders={"text_encoder": new_llama, "text_encoder_2": new_clip},
    new_scheduler=partial(FlowMatchEulerDiscreteScheduler, shift=7.0),
    max_tokens={"tokenizer": TEMPLATE_TOKENS + MAX_TOKENS, "tokenizer_2": MAX_TOKENS},
    tokenize=tokenize,
    encode_text=encode_text,
    predict=predict,
    statistics=statistics,
    saved_classes={"vae": AutoencoderKLHunyuanVideo, "transformer": HunyuanVideoTransformer3DModel},
    model_index={
        "_class_name": "HunyuanVideoPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "LlamaModel"],
        "text_encoder_2": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "tokenizer_2": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "HunyuanVideoTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLHunyuanVideo"],
    },
    # Short windows teach most for their time. But the norms see all frames, so whole clips and pictures come next. The
    # noise is 0.03 of the deviation that the latents have by then. Three phases more, with windows beside whole clips,
    # brought the last two decibels.
    vae_phases=(
        VaePhase(((6, 5),), learning_rate=2e-3, matrix_learning_rate=1e-2, autocast=True),
        VaePhase((*[(2, None)] * 3, (12, 1)), learning_rate=2e-3, matrix_learning_rate=8e-3, autocast=True),
        VaePhase(**SHARP, matrix_learning_rate=6e-3, decoder_only=True),
        VaePhase(**SHARP, matrix_learning_rate=5e-3),
        VaePhase(WINDOWS, **SHARP, matrix_learning_rate=8e-3),
        VaePhase(WINDOWS, **{**SHARP, "noise": 0.06, "absolute": 0.5}, matrix_learning_rate=5e-3, decoder_only=True),
        VaePhase(WINDOWS, **{**SHARP, "noise": 0.03, "absolute": 1.0}, matrix_learning_rate=5e-3, decoder_only=True),
    ),
    base_matrix_learning_rate=4e-3,
    train={
        "train": {"method": "lora", "rank": 12},
        "learning_rate": 8e-4,
        "lr_schedule": "cosine",
        "levels": "ptss(0.8)",  # one level for all frames now and then keeps what the base can do
    },
    effort=Effort(
        vae_steps=(1100, 1400, 1950, 480, 3000, 1100, 900),
        base_clips=5200,
        base_steps=4200,  # of the built-in one, 2,200 with latents of the first four phases
        pusa_clips=640,
        pusa_steps=600,
    ),
)
