"""Adapt Mochi to what Pusa asks of a base model: tokenizer, text encoder, VAE and clock."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from pusa.backbones.base import Backbone
from pusa.backbones.mochi import FAMILY
from pusa.backbones.mochi.settings import TextEncoderSettings, TransformerSettings, VaeSettings
from pusa.backbones.mochi.transformer import PusaMochiTransformer3DModel
from pusa.backbones.mochi.vae import PusaAutoencoderKLMochi
from pusa.backbones.t5_tokenizer import load_t5_tokenizer, tokenize
from pusa.diffusion.sampler import TextFeatures

TEXT_TOKENS = 256
PIXELS_AT_ONCE = 2 * 6 * 848 * 480  # two latent frames at the published size: the VAE works in about 11 GiB, in bf16
FRAMES_AT_ONCE = 12  # latent frames, however small: more are no faster, and would let memory grow with the length


class Mochi(Backbone):
    """genmo's Mochi 1, and `builtin:tiny`, which has the same classes at tiny size."""

    family = FAMILY
    classes = {  # noqa: RUF012
        "transformer": PusaMochiTransformer3DModel,
        "vae": PusaAutoencoderKLMochi,
        "text_encoder": T5EncoderModel,
    }
    settings = {  # noqa: RUF012
        "transformer": TransformerSettings,
        "vae": VaeSettings,
        "text_encoder": TextEncoderSettings,
    }

    def load_tokenizer(self, part: str, folder: Path) -> PreTrainedTokenizerBase:
        """Load T5's tokenizer, from tokenizer.json or the published spiece.model.

        Raises:
            WeightsError: the folder has neither, or it cannot be loaded.
        """
        return load_t5_tokenizer(folder, self.family.vocabularies)

    def longest_text(self, transformer: PusaMochiTransformer3DModel, batch: int) -> TextFeatures:
        """Return features of 256 tokens on the transformer's device, without meaningful values."""
        shape = (batch, TEXT_TOKENS, transformer.config.text_embed_dim)
        features = torch.empty(shape, dtype=transformer.dtype, device=transformer.device)
        return TextFeatures(features, torch.ones(shape[:2], dtype=torch.bool, device=transformer.device))

    @torch.no_grad()
    def encode_text(self, parts: Mapping[str, Any], prompts: Sequence[str], padded: bool = True) -> TextFeatures:
        """Encode prompts to T5 features (B, L, width) and mask (B, L). An empty prompt is T5 of zeroed ids, none valid.

        L is 256, or the length of the longest prompt if not `padded`: the valid features are the same.

        Raises:
            WeightsError: the tokenizer gives tokens that the text encoder does not know.
        """
        tokenizer, model = parts["tokenizer"], parts["text_encoder"]
        ids, mask = tokenize(tokenizer, model, prompts, TEXT_TOKENS, padded)
        empty = torch.tensor([not prompt.strip() for prompt in prompts], device=model.device)[:, None]
        ids, mask = ids.masked_fill(empty, 0), mask & ~empty
        return TextFeatures(model(ids, attention_mask=mask).last_hidden_state, mask)

    @torch.no_grad()
    def encode_video(self, vae: PusaAutoencoderKLMochi, x_BCTHW: Tensor, tile: int = 0) -> tuple[Tensor, Tensor]:
        """Encode uint8 frames or pixels in [-1, 1] to posterior mean and log-variance, each (B, C, F, h, w).

        Tiles overlap by a quarter.
        """
        vae.latent_frames_at_once = _chunk_length(len(x_BCTHW) * x_BCTHW[0, 0, 0].numel() * self.geometry.temporal)
        if tile:
            vae.enable_tiling(tile, tile, tile * 3 // 4, tile * 3 // 4)
        try:
            posterior = vae.encode(x_BCTHW).latent_dist
        finally:
            vae.disable_tiling()
        return posterior.mean.float(), posterior.logvar.float()

    @torch.no_grad()
    def decode_video(
        self, vae: PusaAutoencoderKLMochi, z_BCFhw: Tensor, at_once: int | None = None, tile: int = 0
    ) -> Iterator[Tensor]:
        """Decode latents in the VAE's own space; yield pixels in [-1, 1], (B, 3, t, H, W). Tiles overlap by a quarter.

        `at_once` does not change the result.
        """
        at_once = self.frames_at_once(z_BCFhw) if at_once is None else at_once
        chunks = vae.decode_chunks(z_BCFhw.to(vae.device, vae.dtype), at_once, tile)
        yield from map(lambda x_BCTHW: x_BCTHW.float().clamp(-1, 1), chunks)  # a `for` would keep the chunk before

    def frames_at_once(self, z_BCFhw: Tensor) -> int:
        """Return how many latent frames are decoded at a time, as memory for two of the published size allows."""
        pixels = len(z_BCFhw) * z_BCFhw[0, 0, 0].numel() * self.geometry.spatial**2 * self.geometry.temporal
        return min(z_BCFhw.shape[2], _chunk_length(pixels))

    def latent_statistics(self, vae: PusaAutoencoderKLMochi) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of each channel of the VAE's output, each (C, 1, 1, 1)."""
        view = (-1, 1, 1, 1)
        return torch.tensor(vae.config.latents_mean).view(view), torch.tensor(vae.config.latents_std).view(view)

    def predict(
        self, transformer: PusaMochiTransformer3DModel, z_BCFhw: Tensor, sigma_BF: Tensor, text: TextFeatures
    ) -> Tensor:
        """Predict the velocity x0 - eps. Mochi's own timestep is t = 1000 * (1 - sigma)."""
        return transformer(
            hidden_states=z_BCFhw,
            encoder_hidden_states=text.features,
            timestep=1000 * (1 - sigma_BF),
            encoder_attention_mask=text.mask,
            return_dict=False,
        )[0].float()


def _chunk_length(pixels: int) -> int:
    """Return how many latent frames the VAE works on at a time, each of `pixels` in all samples and frames."""
    return min(FRAMES_AT_ONCE, max(1, PIXELS_AT_ONCE // pixels))
