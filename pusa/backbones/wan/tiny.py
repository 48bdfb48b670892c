"""Build Wan's classes at tiny size: for 64x64 pixels, 29 frames, and captions of a few known words.

The VAE has Wan 2.2's shortcuts and patches at Wan 2.1's compression: full-size convolutions see half the resolution,
which a CPU trains fast. Shapes: x_BCTHW pixels in [-1, 1], z_BCFhw latents (F = 1 + (T - 1) / 4, h = H / 8, w = W / 8).
"""

from collections.abc import Mapping
from functools import partial

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from pusa.backbones.tiny_recipe import TEXT_ENCODER, TEXT_WIDTH, Effort, TinyRecipe, Tokens, VaePhase
from pusa.backbones.wan.transformer import PusaWanTransformer3DModel
from pusa.backbones.wan.vae import PusaAutoencoderKLWan
from pusa.diffusion.sampler import TextFeatures

MAX_TOKENS, CHANNELS = 16, 16
TRANSFORMER = {
    "num_attention_heads": 6,
    "attention_head_dim": 24,
    "num_layers": 4,
    "ffn_dim": 432,
    "freq_dim": 64,
    "text_dim": TEXT_WIDTH,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "rope_max_seq_len": 64,
}
PATCH = 2
VAE = {
    "base_dim": 16,
    "decoder_base_dim": 32,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "z_dim": CHANNELS,
    "latents_mean": [0.0] * CHANNELS,
    "latents_std": [1.0] * CHANNELS,
    "is_residual": True,
    "patch_size": PATCH,
    "in_channels": 3 * PATCH**2,
    "out_channels": 3 * PATCH**2,
}
START_LOGVAR = -4.0
BRANCH_SCALE = 0.1  # of what is added to the shortcuts at the start


def new_transformer() -> PusaWanTransformer3DModel:
    """Build an untrained transformer. It predicts 0."""
    model = PusaWanTransformer3DModel(**TRANSFORMER)
    with torch.no_grad():
        model.proj_out.weight.zero_()
        model.proj_out.bias.zero_()
    return model


def new_text_encoder(vocabulary: int) -> UMT5EncoderModel:
    """Build an untrained UMT5 encoder of two layers, which learns together with the transformer."""
    return UMT5EncoderModel(UMT5Config(vocab_size=vocabulary, **TEXT_ENCODER))


def encode_text(encoders: Mapping[str, UMT5EncoderModel], tokens: Tokens, kept_B: Tensor) -> TextFeatures:
    """Return UMT5's features (B, L, width) of tokens; zeros where there is no valid token, or no caption is kept."""
    mask_BL = tokens["mask"] & kept_B[:, None]
    features: Tensor = encoders["text_encoder"](tokens["ids"], attention_mask=mask_BL).last_hidden_state
    return TextFeatures(features * mask_BL[..., None], mask_BL)


def predict(transformer: WanTransformer3DModel, z_BCFhw: Tensor, sigma_B: Tensor, text: TextFeatures) -> Tensor:
    """Predict the velocity x0 - eps from one level for each clip, as the base model does."""
    velocity: Tensor = transformer(
        hidden_states=z_BCFhw, timestep=1000 * sigma_B, encoder_hidden_states=text.features
    ).sample
    return -velocity


def new_vae(_: Tensor) -> PusaAutoencoderKLWan:
    """Build an untrained VAE that starts close to its shortcuts, which average pixels and repeat them."""
    vae = PusaAutoencoderKLWan(**VAE)
    vae.latent_frames_at_once = MAX_TOKENS  # more than any clip has
    with torch.no_grad():
        for name, module in vae.named_modules():
            if name.endswith(("conv2", "sampler.resample.1")):
                module.weight.mul_(BRANCH_SCALE)
                module.bias.zero_()
            elif name.endswith("attentions.0.proj"):
                module.weight.zero_()
        vae.quant_conv.weight[CHANNELS:].mul_(BRANCH_SCALE)
        vae.quant_conv.bias[CHANNELS:].add_(START_LOGVAR)
    return vae


def decode(vae: PusaAutoencoderKLWan, z_BCFhw: Tensor) -> Tensor:
    """Return pixels (B, 3, T, H, W), with gradients also where they are outside [-1, 1]."""
    return torch.cat(list(vae.decode_chunks(z_BCFhw, z_BCFhw.shape[2])), 2)


RECIPE = TinyRecipe(
    new_vae=new_vae,
    new_transformer=new_transformer,
    new_text_encoders={"text_encoder": new_text_encoder},
    new_scheduler=partial(FlowMatchEulerDiscreteScheduler, shift=5.0),
    max_tokens={"tokenizer": MAX_TOKENS},
    encode_text=encode_text,
    predict=predict,
    saved_classes={"vae": AutoencoderKLWan, "transformer": WanTransformer3DModel},
    model_index={
        "_class_name": "WanPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    },
    decode=decode,
    vae_phases=(VaePhase(((4, 13),), learning_rate=2e-3, matrix_learning_rate=6e-3),),
    train={
        "train": {"method": "lora", "rank": 32},
        "learning_rate": 1.5e-3,
        "lr_schedule": "cosine",
        "levels": "ptss(0.8)",  # one level for all frames now and then keeps what the base can do
    },
    effort=Effort(vae_steps=(1050,), base_clips=5200, base_steps=4600, pusa_clips=640, pusa_steps=600),
)
