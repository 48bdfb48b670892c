"""Train the parts of a tiny model from nothing: a tokenizer of the captions' words, the VAE, the text encoder and base.

Shapes: x_BCTHW pixels in [-1, 1], z_BCFhw latents; drawn clips are (N, T, H, W, 3) uint8.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from pusa.backbones.tiny_recipe import TinyRecipe, VaePhase
from pusa.diffusion.seeds import seeded
from pusa.diffusion.timesteps import add_noise, logit_normal, target, uniform
from pusa.tiny.shapes import COLOURS, DIRECTIONS, GROUNDS, SHAPES

SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")
OTHER_WORDS = ("a", "and", "on", "background", "move", "moves", "grow", "grows", "bounce", "bounces")
KL_WEIGHT = 1e-5
CAPTION_DROPOUT = 0.1
EMA_DECAY = 0.998


def new_tokenizer(max_tokens: int) -> PreTrainedTokenizerFast:
    """Build a tokenizer that knows every word of every caption; any other word is <unk>."""
    vocabulary: dict[str, int] = {}
    for word in (*SPECIAL_TOKENS, *OTHER_WORDS, *COLOURS, *GROUNDS, *SHAPES, *DIRECTIONS):
        vocabulary[word] = len(vocabulary)
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106  # a token of text, not a secret
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_tokens,
        pad_token="<pad>",  # noqa: S106
        eos_token="</s>",  # noqa: S106
        unk_token="<unk>",  # noqa: S106
    )


def to_pixels(clips: np.ndarray | Tensor) -> Tensor:
    """Return clips (B, T, H, W, 3) uint8 as (B, 3, T, H, W) in [-1, 1], as a 4:2:0 video would show them."""
    return subsample_chroma(torch.as_tensor(clips).movedim(-1, 1).float() / 127.5 - 1)


def subsample_chroma(x_BCTHW: Tensor) -> Tensor:
    """Return pixels as 4:2:0 video stores them: colour at half resolution (BT.601), brightness unchanged."""
    kr, kg, kb = 0.299, 0.587, 0.114
    r, g, b = x_BCTHW.unbind(1)
    luma = kr * r + kg * g + kb * b
    chroma = torch.stack([r - luma, b - luma], 1)
    half = F.avg_pool3d(chroma, (1, 2, 2))
    r, b = (F.interpolate(half, scale_factor=(1, 2, 2), mode="nearest") + luma[:, None]).unbind(1)
    return torch.stack([r, (luma - kr * r - kb * b) / kg, b], 1).clamp(-1, 1)


class Muon(torch.optim.Optimizer):
    """Update weights of two or more dimensions by orthogonalized momentum, as matrices (out, rest).

    Much faster than Adam from a random start (Jordan et al. 2024, kellerjordan.github.io/posts/muon); the scale of an
    update, 0.2 * sqrt(max(out, rest)), is AdamW's (Liu et al. 2025, arXiv:2502.16982). torch's class takes matrices
    alone, no convolutions.
    """

    def __init__(self, weights: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(weights, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the weights that have a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state, momentum = self.state[weight], group["momentum"]
                average = state.setdefault("average", torch.zeros_like(weight))
                average.lerp_(weight.grad, 1 - momentum)
                update = _orthogonalize(weight.grad.lerp(average, momentum).flatten(1)).view_as(weight)
                weight.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(len(weight), weight[0].numel())))


def _orthogonalize(matrix: Tensor) -> Tensor:
    """Return a matrix with the same singular vectors, and singular values near 1, by five Newton-Schulz steps."""
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.T if is_tall else x


class Optimizers:
    """AdamW, and Muon for some of the weights; the learning rates of both follow one schedule.

    Args:
        weights: all that are trained.
        matrices: those of them that Muon trains, if it has a rate.
        matrix_rate: Muon's learning rate; None: AdamW trains all weights.
        schedule: step, from 0 -> factor of the learning rates.
        adam: AdamW's settings.
    """

    def __init__(
        self,
        weights: Sequence[nn.Parameter],
        matrices: Sequence[nn.Parameter],
        matrix_rate: float | None,
        schedule: Callable[[int], float],
        **adam: Any,
    ) -> None:
        chosen = {id(matrix) for matrix in matrices} if matrix_rate else set()
        rest = [weight for weight in weights if id(weight) not in chosen]
        optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, **adam)]
        if matrix_rate:
            optimizers.append(Muon(matrices, matrix_rate))
        self.weights, self.optimizers = weights, optimizers
        self.schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, schedule) for optimizer in optimizers]

    def step(self) -> None:
        """Update the weights by their clipped gradients, which are then cleared."""
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


def train_vae(
    recipe: TinyRecipe,
    vae: Any,
    clips: np.ndarray,
    phase: VaePhase,
    *,
    steps: int,
    seed: int = 0,
    on_step: Callable[[int, float], None] = lambda step, psnr: None,
) -> None:
    """Train a VAE in place for mean squared error and a small KL divergence.

    Args:
        recipe: how it decodes.
        vae: a diffusers VAE.
        clips: drawn clips (N, T, H, W, 3) uint8.
        phase: how it is trained. Learning rates are those after the warm-up; they decay to 0 along a cosine.
        steps: optimizer steps.
        seed: chooses clips and noise.
        on_step: called after each step with its number, from 0, and the PSNR of its batch in dB.
    """
    generator, rng, warmup = seeded(seed), np.random.default_rng(seed), max(1, steps // 20)
    vae.encoder.requires_grad_(not phase.decoder_only)
    weights = [weight for weight in vae.parameters() if weight.requires_grad]
    optimizers = Optimizers(
        weights, [weight for weight in weights if weight.ndim > 3 and len(weight) > 1], phase.matrix_learning_rate,
        lambda i: min((i + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * i / steps)),
        lr=phase.learning_rate, betas=(0.9, 0.99), weight_decay=0.0,
    )  # fmt: skip
    for step in range(steps):
        count, frames = phase.batches[step % len(phase.batches)]
        frames = frames or clips.shape[1]
        rows = rng.choice(len(clips), count, replace=False)
        start = rng.integers(clips.shape[1] - frames + 1)
        x = to_pixels(clips[rows, start : start + frames])
        with torch.autocast("cpu", torch.bfloat16, enabled=phase.autocast):
            with torch.set_grad_enabled(not phase.decoder_only):
                posterior = vae.encode(x).latent_dist
            z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
            z = z + phase.noise * torch.randn(z.shape, generator=generator)
            y = recipe.decode(vae, z).float()
        error = F.mse_loss(y, x)
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        (error + phase.absolute * F.l1_loss(y, x) + KL_WEIGHT * kl).backward()
        optimizers.step()
        on_step(step, 10 * math.log10(4 / error.item()))
    vae.encoder.requires_grad_(True)


@torch.no_grad()
def reconstruction_psnr(vae: Any, clips: Iterable[np.ndarray]) -> float:
    """Return the mean PSNR in dB of clips (T, H, W, 3) uint8 against what the VAE decodes from the posterior's mode."""
    scores = []
    for clip in clips:
        x = to_pixels(clip[None])
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
        scores.append(10 * math.log10(4 / F.mse_loss(y, x).item()))
    return float(np.mean(scores))


@torch.no_grad()
def encode_clips(vae: Any, clips: np.ndarray, batch_size: int = 8) -> Tensor:
    """Return the posterior's mean (N, C, F, h, w) of clips (N, T, H, W, 3) uint8, in the VAE's own space."""
    batches = (clips[i : i + batch_size] for i in range(0, len(clips), batch_size))
    return torch.cat([vae.encode(to_pixels(batch)).latent_dist.mean for batch in batches])


@dataclass(frozen=True)
class CaptionedLatents:
    """Latents in the transformer's space (N, C, F, h, w), and their N captions."""

    latents: Tensor
    captions: Sequence[str]


def train_base(
    recipe: TinyRecipe,
    transformer: Any,
    text_encoders: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    clips: CaptionedLatents,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int = 0,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Train transformer and text encoders in place as an ordinary base model, with one level for each clip.

    `learning_rate` is AdamW's; the recipe may have another for the matrices of the transformer's blocks. All end with
    the moving average of their weights. Half of the levels are uniform, half logit-normal. `on_step` is called after
    each step with its number, from 0, and its loss.
    """
    generator = seeded(seed)
    model = nn.ModuleList([transformer, *text_encoders.values()]).train()
    average = deepcopy(model)
    matrices = [weight for name, weight in transformer.named_parameters() if weight.ndim == 2 and "blocks" in name]
    warmup = max(1, steps // 25)
    optimizers = Optimizers(
        list(model.parameters()), matrices, recipe.base_matrix_learning_rate,
        lambda i: min((i + 1) / warmup, 0.02 + 0.49 * (1 + math.cos(math.pi * i / steps))),
        lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True,
    )  # fmt: skip
    tokens = recipe.tokenize(tokenizer, clips.captions)
    for step in range(steps):
        rows = torch.randint(len(clips.latents), (batch_size,), generator=generator)
        kept_B = torch.rand(batch_size, generator=generator) >= CAPTION_DROPOUT
        x0 = clips.latents[rows]
        noise = torch.randn(x0.shape, generator=generator)
        half = (batch_size // 2, 1)
        sigma_B1 = torch.cat([uniform(half, generator), logit_normal(half, generator)])
        text = recipe.encode_text(text_encoders, {name: part[rows] for name, part in tokens.items()}, kept_B)
        z = add_noise(x0, noise, sigma_B1.expand(-1, x0.shape[2]))
        loss = F.mse_loss(recipe.predict(transformer, z, sigma_B1[:, 0], text), target(x0, noise))
        loss.backward()
        optimizers.step()
        with torch.no_grad():
            decay = min(EMA_DECAY, (1 + step) / (10 + step))
            for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
                slow.lerp_(fast, 1 - decay)
        on_step(step, loss.item())
    model.load_state_dict(average.state_dict())
    model.eval()
