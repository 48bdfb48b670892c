"""Adapt HunyuanVideo to what Pusa asks of a base model: tokenizers, text encoders, VAE and clock."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor
from transformers import CLIPTextModel, PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from pusa.backbones.base import Backbone
from pusa.backbones.hunyuan_video import FAMILY
from pusa.backbones.hunyuan_video.settings import SETTINGS
from pusa.backbones.hunyuan_video.text import LLAMA_TOKENS, PusaLlamaModel, encode_with_clip, encode_with_llama
from pusa.backbones.hunyuan_video.transformer import PusaHunyuanVideoTransformer3DModel
from pusa.backbones.hunyuan_video.vae import PusaAutoencoderKLHunyuanVideo
from pusa.backbones.tokenizer import load_tokenizer
from pusa.diffusion.sampler import TextFeatures


class HunyuanVideo(Backbone):
    """Tencent's HunyuanVideo, and `builtin:tiny-hunyuan`, which has the same classes at tiny size."""

    family = FAMILY
    own_tile = FAMILY.latent_settings["tile"]
    tile_frames = FAMILY.latent_settings["tile_frames"] + 1
    pixels_at_once = tile_frames * own_tile**2  # one tile: about 9 GiB to decode and 5 to encode, in bf16
    classes = {  # noqa: RUF012
        "transformer": PusaHunyuanVideoTransformer3DModel,
        "vae": PusaAutoencoderKLHunyuanVideo,
        "text_encoder": PusaLlamaModel,
        "text_encoder_2": CLIPTextModel,
    }
    settings = SETTINGS

    def load_tokenizer(self, part: str, folder: Path) -> PreTrainedTokenizerBase:
        """Load the tokenizer of Llama, or of CLIP for "tokenizer_2".

        Raises:
            WeightsError: the folder has none, or it cannot be loaded.
        """
        return load_tokenizer(folder, self.family.vocabularies)

    def finish(self, part: str, model: Any) -> None:
        """Compute what a text encoder knows of positions, which no file has."""
        if part == "text_encoder":
            model.rotary_emb = LlamaRotaryEmbedding(model.config)
        elif part == "text_encoder_2":
            model.embeddings.position_ids = torch.arange(model.config.max_position_embeddings)[None]

    def longest_text(self, transformer: PusaHunyuanVideoTransformer3DModel, batch: int) -> TextFeatures:
        """Return features of 256 tokens on the transformer's device, without meaningful values."""
        config = transformer.config
        like = {"dtype": transformer.dtype, "device": transformer.device}
        features = torch.empty(batch, LLAMA_TOKENS, config.text_embed_dim, **like)
        mask = torch.ones(batch, LLAMA_TOKENS, dtype=torch.bool, device=transformer.device)
        return TextFeatures(features, mask, torch.empty(batch, config.pooled_projection_dim, **like))

    @torch.no_grad()
    def encode_text(self, parts: Mapping[str, Any], prompts: Sequence[str], padded: bool = True) -> TextFeatures:
        """Encode prompts to Llama's features (B, L, width), mask (B, L), and CLIP's pooled features.

        L is 256, or the length of the longest prompt if not `padded`: the valid features are the same. An empty prompt
        has one valid token, the end of Llama's template.

        Raises:
            WeightsError: a tokenizer gives tokens that its text encoder does not know, or does not fit it otherwise.
        """
        features, mask = encode_with_llama(parts["tokenizer"], parts["text_encoder"], prompts, padded)
        return TextFeatures(features, mask, encode_with_clip(parts["tokenizer_2"], parts["text_encoder_2"], prompts))

    def drop_text(self, text: TextFeatures, kept_B: Tensor, null: TextFeatures) -> TextFeatures:
        """Return the features with those of dropped samples replaced by the empty prompt's, as the base was trained."""
        assert text.pooled is not None and null.pooled is not None
        kept_B1 = kept_B[:, None]
        return TextFeatures(
            torch.where(kept_B1[..., None], text.features, null.features),
            torch.where(kept_B1, text.mask, null.mask),
            torch.where(kept_B1, text.pooled, null.pooled),
        )

    def predict(
        self,
        transformer: PusaHunyuanVideoTransformer3DModel,
        z_BCFhw: Tensor,
        sigma_BF: Tensor,
        text: TextFeatures,
        embedded_guidance: float | None = None,
    ) -> Tensor:
        """Predict the velocity x0 - eps. HunyuanVideo's own is eps - x0, and its timestep is t = 1000 * sigma.

        A model without `guidance_embeds` has no use for the embedded guidance.
        """
        number = self.family.job.embedded_guidance if embedded_guidance is None else embedded_guidance
        assert number is not None
        velocity: Tensor = transformer(
            hidden_states=z_BCFhw,
            timestep=1000 * sigma_BF.float(),
            encoder_hidden_states=text.features,
            encoder_attention_mask=text.mask,
            pooled_projections=text.pooled,
            guidance=torch.full((len(z_BCFhw),), 1000.0 * number, device=z_BCFhw.device),
            return_dict=False,
        )[0]
        return -velocity.float()

    @torch.no_grad()
    def encode_video(self, vae: PusaAutoencoderKLHunyuanVideo, x_BCTHW: Tensor, tile: int = 0) -> tuple[Tensor, Tensor]:
        """Encode uint8 frames or pixels in [-1, 1] to posterior mean and log-variance, each (B, C, F, h, w).

        Small clips are encoded together, and large ones one by one. Tiles overlap by a quarter.

        Raises:
            ConditionError: the number of frames is not 4k + 1, or the VAE would drop pixels.
        """
        frames, *size = x_BCTHW.shape[2:]
        pixels = min(frames, self.tile_frames) * math.prod(min(side, tile or self.own_tile) for side in size)
        clips = x_BCTHW.split(max(1, self.pixels_at_once // max(1, pixels)))
        moments = torch.cat([torch.cat(list(vae.encode_chunks(clip, tile)), 2) for clip in clips])
        posterior = DiagonalGaussianDistribution(moments)
        return posterior.mean.float(), posterior.logvar.float()

    def frames_at_once(self, z_BCFhw: Tensor) -> int:
        """Return how many latent frames are decoded at a time: those of a tile, whatever memory there is."""
        return min(z_BCFhw.shape[2], self.geometry.latent_frames(self.tile_frames))

    def latent_statistics(self, vae: PusaAutoencoderKLHunyuanVideo) -> tuple[Tensor, Tensor]:
        """Return mean 0 and the standard deviation 1 / scaling_factor of each channel, each (C, 1, 1, 1)."""
        shape = (self.geometry.channels, 1, 1, 1)
        return torch.zeros(shape), torch.full(shape, 1 / vae.config.scaling_factor)
