"""Build Mochi's classes at tiny size: for 64x64 pixels, 31 frames, and captions of a few known words.

The VAE starts as a hierarchical PCA. Shapes: x_BCTHW pixels in [-1, 1], z_BCFhw latents (F = 1 + (T - 1) / 6,
h = H / 8, w = W / 8).
"""

import math
from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiTransformer3DModel
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from pusa.backbones.mochi.transformer import PusaMochiTransformer3DModel
from pusa.backbones.mochi.vae import PusaAutoencoderKLMochi
from pusa.backbones.tiny_recipe import TEXT_ENCODER, TEXT_WIDTH, TinyRecipe, Tokens
from pusa.diffusion.sampler import TextFeatures

MAX_TOKENS = 16
TRANSFORMER = {
    "num_attention_heads": 6,
    "attention_head_dim": 24,
    "num_layers": 4,
    "pooled_projection_dim": 48,
    "text_embed_dim": TEXT_WIDTH,
    "time_embed_dim": 128,
    "max_sequence_length": MAX_TOKENS,
}
VAE = {
    "encoder_block_out_channels": (32, 32, 64, 96),
    "decoder_block_out_channels": (32, 32, 64, 64),
    "layers_per_block": (0, 1, 1, 1, 0),
    "temporal_expansions": (3, 2, 1),
    "add_attention_block": (False,) * 5,
}
# The encoder's last norm works on groups of 3 channels: (a, -a, constant).
GROUP = 3
CONSTANT = 6.0
START_LOGVAR = -4.0


def new_transformer() -> PusaMochiTransformer3DModel:
    """Build an untrained transformer. It predicts 0; its rotary frequencies fit 4 x 4 tokens and 6 latent frames."""
    model = PusaMochiTransformer3DModel(**TRANSFORMER)
    with torch.no_grad():
        model.proj_out.weight.zero_()
        model.proj_out.bias.zero_()
        time, *space = model.pos_frequencies
        time.normal_(0, 0.6)
        for axis in space:
            axis.normal_(0, 0.012)
    return model


def new_text_encoder(vocabulary: int) -> T5EncoderModel:
    """Build an untrained T5 encoder of two layers, which learns together with the transformer."""
    return T5EncoderModel(T5Config(vocab_size=vocabulary, **TEXT_ENCODER))


def encode_text(encoders: Mapping[str, T5EncoderModel], tokens: Tokens, kept_B: Tensor) -> TextFeatures:
    """Return T5's features (B, L, width) of tokens; no token is valid of a caption that is not kept."""
    mask_BL = tokens["mask"] & kept_B[:, None]
    return TextFeatures(encoders["text_encoder"](tokens["ids"], attention_mask=mask_BL).last_hidden_state, mask_BL)


def predict(transformer: MochiTransformer3DModel, z_BCFhw: Tensor, sigma_B: Tensor, text: TextFeatures) -> Tensor:
    """Predict the velocity x0 - eps from one level for each clip, as the base model does."""
    velocity: Tensor = transformer(
        hidden_states=z_BCFhw,
        encoder_hidden_states=text.features,
        timestep=1000 * (1 - sigma_B),
        encoder_attention_mask=text.mask,
    ).sample
    return velocity


def new_vae(x_BCTHW: Tensor) -> PusaAutoencoderKLMochi:
    """Build a VAE that starts as the best linear one: each stage is the PCA of the output of the stage before it.

    A pair of channels passes SiLU exactly, since silu(a) - silu(-a) = a. The last group norm would lose absolute
    colour; a constant channel in every group keeps its divisor steady. Residual branches start close to zero.
    """
    vae = PusaAutoencoderKLMochi(**VAE)
    with torch.no_grad():
        for name, weight in vae.named_parameters():
            if "resnets" in name and "conv2" in name:
                weight.mul_(0.05)
        _start_decoder(vae, _start_encoder(vae, x_BCTHW))
    return vae


def _start_encoder(vae: PusaAutoencoderKLMochi, x: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Set the encoder's weights; return mean, directions and standard deviations of each stage's PCA."""
    encoder = vae.encoder
    encoder.proj_in.weight.zero_()
    encoder.proj_in.bias.zero_()
    encoder.proj_in.weight[:3, :3] = torch.eye(3)
    components = []
    stages = list(zip(encoder.down_blocks, VAE["temporal_expansions"], strict=True))
    for index, (block, expansion) in enumerate(stages):
        patches = _patches(x, (expansion, 2, 2))
        conv = block.conv_in.conv
        last = index == len(stages) - 1
        count = min(conv.out_channels // GROUP if last else conv.out_channels - 1, patches.shape[-1])
        mean, rows, deviations = _pca(patches.flatten(0, 3), count)
        components.append((mean, rows, deviations))
        weight, bias = torch.zeros(conv.out_channels, patches.shape[-1]), torch.zeros(conv.out_channels)
        if last:
            weight[0::GROUP], weight[1::GROUP] = rows, -rows
            bias[0::GROUP], bias[1::GROUP] = -(rows @ mean), rows @ mean
            bias[2::GROUP] = CONSTANT * deviations
        else:
            weight[:count] = rows
            bias[:count] = -(rows @ mean)
        conv.weight.zero_()
        conv.weight[:, : x.shape[1]] = weight.view(conv.out_channels, x.shape[1], *conv.kernel_size)
        conv.bias.copy_(bias)
        x = ((patches - mean) @ rows.T).movedim(-1, 1)
    latent = vae.config.latent_channels
    spread = math.sqrt(2) / 3 * CONSTANT  # the group norm's divisor, in standard deviations of `a`
    offset = 1 / math.sqrt(2)  # what the constant adds to the group's mean, after the divisor
    encoder.norm_out.norm_layer.bias[0::GROUP] = encoder.norm_out.norm_layer.bias[1::GROUP] = offset
    encoder.proj_out.weight.zero_()
    for k in range(latent):
        encoder.proj_out.weight[k, GROUP * k] = spread
        encoder.proj_out.weight[k, GROUP * k + 1] = -spread
    steady = F.silu(torch.tensor(CONSTANT * 2 / 3 / spread)) * encoder.proj_out.in_features / GROUP
    encoder.proj_out.weight[latent:, 2::GROUP] = START_LOGVAR / steady
    return components


def _start_decoder(vae: PusaAutoencoderKLMochi, components: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Set the decoder's weights so that it inverts the encoder's PCA, stage by stage."""
    decoder, latent = vae.decoder, vae.config.latent_channels
    decoder.conv_in.weight[:latent] = torch.eye(latent)[..., None, None, None]
    decoder.conv_in.bias.zero_()
    for block, (mean, rows, deviations) in zip(decoder.up_blocks, reversed(components), strict=True):
        first, last = block is decoder.up_blocks[0], block is decoder.up_blocks[-1]
        rows = rows[:latent] * deviations[:latent, None] if first else rows
        weight, bias = block.proj.weight, block.proj.bias
        weight[: rows.shape[1]] = 0
        weight[: rows.shape[1], : rows.shape[0]] = rows.T
        bias[: mean.shape[0]] = mean
        if last:  # a second, negated copy passes the SiLU before proj_out
            weight[mean.shape[0] : 2 * mean.shape[0]] = -weight[: mean.shape[0]]
            bias[mean.shape[0] : 2 * mean.shape[0]] = -mean
    decoder.proj_out.weight.mul_(0.02)
    decoder.proj_out.weight[:, :3] = torch.eye(3)
    decoder.proj_out.weight[:, 3:6] = -torch.eye(3)
    decoder.proj_out.bias.zero_()


def _pca(patches: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean (d,) of patches (n, d), their first directions (count, d) and standard deviations (count,)."""
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(patches.T))
    return mean, vectors.flip(1)[:, :count].T, values.flip(0)[:count].clamp(min=1e-8).sqrt()


def _patches(x_BCTHW: Tensor, kernel: tuple[int, int, int]) -> Tensor:
    """Return the patches that a causal strided convolution sees, which do not overlap: (B, T', H', W', C * kernel)."""
    t, h, w = kernel
    x_BCTHW = torch.cat([x_BCTHW[:, :, :1]] * (t - 1) + [x_BCTHW], 2)
    x = x_BCTHW.unfold(2, t, t).unfold(3, h, h).unfold(4, w, w)
    return x.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(4)


RECIPE = TinyRecipe(
    new_vae=new_vae,
    new_transformer=new_transformer,
    new_text_encoders={"text_encoder": new_text_encoder},
    new_scheduler=partial(FlowMatchEulerDiscreteScheduler, invert_sigmas=True),
    max_tokens={"tokenizer": MAX_TOKENS},
    encode_text=encode_text,
    predict=predict,
    saved_classes={"vae": AutoencoderKLMochi, "transformer": MochiTransformer3DModel},
    model_index={
        "_class_name": "MochiPipeline",
        "force_zeros_for_empty_prompt": True,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "MochiTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLMochi"],
    },
)
