"""The tiny family's VAE: Mochi's own class, started as a hierarchical PCA and then trained on drawn clips.

Shapes: x_BCTHW pixels in [-1, 1], z_BCFhw latents (F = 1 + (T - 1) / 6, h = H / 8, w = W / 8).
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pusa.backbones.mochi.vae import PusaAutoencoderKLMochi

CONFIG = {
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
KL_WEIGHT = 1e-5


def subsample_chroma(x_BCTHW: Tensor) -> Tensor:
    """What 4:2:0 video does to pixels: colour at half resolution (BT.601), brightness untouched."""
    kr, kg, kb = 0.299, 0.587, 0.114
    r, g, b = x_BCTHW.unbind(1)
    luma = kr * r + kg * g + kb * b
    chroma = torch.stack([r - luma, b - luma], 1)
    half = F.avg_pool3d(chroma, (1, 2, 2))
    r, b = (F.interpolate(half, scale_factor=(1, 2, 2), mode="nearest") + luma[:, None]).unbind(1)
    return torch.stack([r, (luma - kr * r - kb * b) / kg, b], 1).clamp(-1, 1)


def to_pixels(clips: np.ndarray | Tensor) -> Tensor:
    """(B, T, H, W, 3) uint8 -> (B, 3, T, H, W) float in [-1, 1], as a 4:2:0 video would show it."""
    return subsample_chroma(torch.as_tensor(clips).movedim(-1, 1).float() / 127.5 - 1)


def new_vae(clips: np.ndarray) -> PusaAutoencoderKLMochi:
    """A VAE that starts as the best linear one: each stage is the PCA of what the stage before it makes of `clips`.

    SiLU is crossed exactly by pairs (silu(a) - silu(-a) = a). The last group norm, which would lose absolute colour,
    is held steady by a constant channel in every group. Residual branches start near nothing.
    """
    vae = PusaAutoencoderKLMochi(**CONFIG)
    with torch.no_grad():
        for name, weight in vae.named_parameters():
            if "resnets" in name and "conv2" in name:
                weight.mul_(0.05)
        components = _start_encoder(vae, to_pixels(clips))
        _start_decoder(vae, components)
    return vae


def _pca(patches: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(n, d) -> mean (d,), the first `count` directions (count, d) and their standard deviations (count,)."""
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(patches.T))
    return mean, vectors.flip(1)[:, :count].T, values.flip(0)[:count].clamp(min=1e-8).sqrt()


def _patches(x_BCTHW: Tensor, kernel: tuple[int, int, int]) -> Tensor:
    """Non-overlapping patches as the causal strided convolution sees them: (B, T', H', W', C * kernel)."""
    t, h, w = kernel
    x_BCTHW = torch.cat([x_BCTHW[:, :, :1]] * (t - 1) + [x_BCTHW], 2)
    x = x_BCTHW.unfold(2, t, t).unfold(3, h, h).unfold(4, w, w)
    return x.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(4)


def _start_encoder(vae: PusaAutoencoderKLMochi, x: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    encoder = vae.encoder
    encoder.proj_in.weight.zero_()
    encoder.proj_in.bias.zero_()
    encoder.proj_in.weight[:3, :3] = torch.eye(3)
    found = []
    stages = list(zip(encoder.down_blocks, CONFIG["temporal_expansions"], strict=True))
    for index, (block, expansion) in enumerate(stages):
        patches = _patches(x, (expansion, 2, 2))
        conv = block.conv_in.conv
        last = index == len(stages) - 1
        count = min(conv.out_channels // GROUP if last else conv.out_channels - 1, patches.shape[-1])
        mean, rows, deviations = _pca(patches.flatten(0, 3), count)
        found.append((mean, rows, deviations))
        weight, bias = torch.zeros(conv.out_channels, patches.shape[-1]), torch.zeros(conv.out_channels)
        if last:
            weight[0::GROUP], weight[1::GROUP] = rows, -rows
            bias[0::GROUP], bias[1::GROUP] = -(rows @ mean), rows @ mean
            bias[2::GROUP] = CONSTANT * deviations
        else:
            weight[:count] = rows
            bias[:count] = -(rows @ mean)
        _set_conv(conv, weight, bias, x.shape[1])
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
    return found


def _set_conv(conv: Any, weight: Tensor, bias: Tensor, channels: int) -> None:
    conv.weight.zero_()
    conv.weight[:, :channels] = weight.view(conv.out_channels, channels, *conv.kernel_size)
    conv.bias.copy_(bias)


def _start_decoder(vae: PusaAutoencoderKLMochi, components: list[tuple[Tensor, Tensor, Tensor]]) -> None:
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
        if last:  # a second, negated copy crosses the SiLU before proj_out
            weight[mean.shape[0] : 2 * mean.shape[0]] = -weight[: mean.shape[0]]
            bias[mean.shape[0] : 2 * mean.shape[0]] = -mean
    decoder.proj_out.weight.mul_(0.02)
    decoder.proj_out.weight[:, :3] = torch.eye(3)
    decoder.proj_out.weight[:, 3:6] = -torch.eye(3)
    decoder.proj_out.bias.zero_()


def train_vae(
    vae: PusaAutoencoderKLMochi,
    clips: np.ndarray,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    decoder_only: bool = False,
    noise: float = 0.0,
    seed: int = 0,
    report: Callable[[int, float], None] = lambda step, psnr: None,
) -> None:
    """Train on (N, T, H, W, 3) uint8 clips for mean squared error and a small KL; `noise` steadies the decoder."""
    generator = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)
    vae.encoder.requires_grad_(not decoder_only)
    weights = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * i / steps))
    )
    for step in range(steps):
        x = to_pixels(clips[rng.choice(len(clips), batch_size, replace=False)])
        with torch.set_grad_enabled(not decoder_only):
            posterior = vae.encode(x).latent_dist
        z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        z = z + noise * torch.randn(z.shape, generator=generator)
        error = F.mse_loss(vae.decode(z).sample, x)
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        (error + KL_WEIGHT * kl).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        report(step, 10 * math.log10(4 / error.item()))
    vae.encoder.requires_grad_(True)


@torch.no_grad()
def reconstruction_psnr(vae: PusaAutoencoderKLMochi, clips: Iterable[np.ndarray]) -> float:
    """Mean PSNR in dB of the VAE round trip (posterior mean), over (T, H, W, 3) uint8 clips."""
    scores = []
    for clip in clips:
        x = to_pixels(clip[None])
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
        scores.append(10 * math.log10(4 / F.mse_loss(y, x).item()))
    return float(np.mean(scores))
