"""The tiny family's base: an ordinary Mochi, one level a clip, trained from nothing together with its text encoder."""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import MochiTransformer3DModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from pusa.backbones.mochi.transformer import PusaMochiTransformer3DModel
from pusa.backbones.mochi.vae import PusaAutoencoderKLMochi
from pusa.diffusion.timesteps import add_noise, logit_normal, target, uniform
from pusa.tiny.vae import to_pixels

CONFIG = {
    "num_attention_heads": 6,
    "attention_head_dim": 24,
    "num_layers": 4,
    "pooled_projection_dim": 48,
    "text_embed_dim": 64,
    "time_embed_dim": 128,
    "max_sequence_length": 16,
}
CAPTION_DROPOUT = 0.1
EMA_DECAY = 0.998


@dataclass(frozen=True)
class Clips:
    """Latents in the transformer's space (N, C, F, h, w) and the captions they show."""

    latents: Tensor
    captions: Sequence[str]


def new_transformer() -> PusaMochiTransformer3DModel:
    """An untrained transformer: it predicts 0, and its rotary frequencies fit 4 x 4 tokens and 6 latent frames."""
    model = PusaMochiTransformer3DModel(**CONFIG)
    with torch.no_grad():
        model.proj_out.weight.zero_()
        model.proj_out.bias.zero_()
        time, *space = model.pos_frequencies
        time.normal_(0, 0.6)
        for axis in space:
            axis.normal_(0, 0.012)
    return model


@torch.no_grad()
def encode(vae: PusaAutoencoderKLMochi, videos: np.ndarray, batch_size: int = 8) -> Tensor:
    """Drawn clips (N, T, H, W, 3) uint8 -> latents in the VAE's own space (N, C, F, h, w), the posterior's mean."""
    batches = (videos[i : i + batch_size] for i in range(0, len(videos), batch_size))
    return torch.cat([vae.encode(to_pixels(batch)).latent_dist.mean for batch in batches])


def train_base(
    transformer: MochiTransformer3DModel,
    text_encoder: T5EncoderModel,
    tokenizer: PreTrainedTokenizerFast,
    clips: Clips,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int = 0,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Train both in place, ending with the moving average of their weights. Levels: half uniform, half logit-normal."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.ModuleList([transformer, text_encoder]).train()
    average = deepcopy(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    warmup = max(1, steps // 25)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warmup, 0.02 + 0.49 * (1 + math.cos(math.pi * i / steps)))
    )
    tokens = tokenizer(list(clips.captions), padding="max_length", return_tensors="pt")
    for step in range(steps):
        rows = torch.randint(len(clips.latents), (batch_size,), generator=generator)
        kept = torch.rand(batch_size, 1, generator=generator) >= CAPTION_DROPOUT
        mask = tokens.attention_mask[rows].bool() & kept
        x0 = clips.latents[rows]
        noise = torch.randn(x0.shape, generator=generator)
        half = (batch_size // 2, 1)
        sigma_B1 = torch.cat([uniform(half, generator), logit_normal(half, generator)])
        sigma_BF = sigma_B1.expand(-1, x0.shape[2])
        features = text_encoder(tokens.input_ids[rows], attention_mask=mask).last_hidden_state
        velocity = transformer(
            hidden_states=add_noise(x0, noise, sigma_BF),
            encoder_hidden_states=features,
            timestep=1000 * (1 - sigma_B1[:, 0]),
            encoder_attention_mask=mask,
        ).sample
        loss = F.mse_loss(velocity, target(x0, noise))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        with torch.no_grad():
            decay = min(EMA_DECAY, (1 + step) / (10 + step))
            for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
                slow.lerp_(fast, 1 - decay)
        report(step, loss.item())
    model.load_state_dict(average.state_dict())
    model.eval()
