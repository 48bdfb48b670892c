"""Adapt Mochi to what Pusa asks of a base model: tokenizer, text encoder, VAE and clock."""

from collections.abc import Mapping, Sequence
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
from pusa.backbones.tokenizer import load_tokenizer, tokenize
from pusa.diffusion.sampler import TextFeatures

TEXT_TOKENS = 256


class Mochi(Backbone):
    """genmo's Mochi 1, and `builtin:tiny`, which has the same classes at tiny size."""

    family = FAMILY
    pixels_at_once = 2 * 6 * 848 * 480  # two latent frames at the published size: about 11 GiB, in bf16
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
        return load_tokenizer(folder, self.family.vocabularies)

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
        vae.latent_frames_at_once = self.chunk_length(len(x_BCTHW) * x_BCTHW[0, 0, 0].numel() * self.geometry.temporal)
        if tile:
            vae.enable_tiling(tile, tile, tile * 3 // 4, tile * 3 // 4)
        try:
            posterior = vae.encode(x_BCTHW).latent_dist
        finally:
            vae.disable_tiling()
        return posterior.mean.float(), posterior.logvar.float()

    def predict(
        self,
        transformer: PusaMochiTransformer3DModel,
        z_BCFhw: Tensor,
        sigma_BF: Tensor,
        text: TextFeatures,
        embedded_guidance: float | None = None,
    ) -> Tensor:
        """Predict the velocity x0 - eps. Mochi's own timestep is t = 1000 * (1 - sigma)."""
        return transformer(
            hidden_states=z_BCFhw,
            encoder_hidden_states=text.features,
            timestep=1000 * (1 - sigma_BF),
            encoder_attention_mask=text.mask,
            return_dict=False,
        )[0].float()
