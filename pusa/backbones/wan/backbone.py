"""Adapt Wan 2.1 and 2.2 to what Pusa asks of a base model: tokenizer, text encoder, VAE and clock."""

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ftfy
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from pusa.backbones.base import Backbone
from pusa.backbones.family import Family
from pusa.backbones.tokenizer import load_tokenizer, tokenize
from pusa.backbones.wan import WAN_2_1, WAN_2_2_5B
from pusa.backbones.wan.settings import SETTINGS, SETTINGS_5B
from pusa.backbones.wan.transformer import PusaWanTransformer3DModel
from pusa.backbones.wan.vae import PusaAutoencoderKLWan
from pusa.diffusion.sampler import TextFeatures

TEXT_TOKENS = 512


class Wan(Backbone):
    """Wan 2.1 and 2.2 by Alibaba. The families differ in the number of transformers and in the VAE."""

    family = WAN_2_1
    pixels_at_once = 4 * 4 * 832 * 480  # four latent frames of 480p, or one of 720p: about 10 GiB, in bf16
    classes = {  # noqa: RUF012
        "transformer": PusaWanTransformer3DModel,
        "transformer_2": PusaWanTransformer3DModel,
        "vae": PusaAutoencoderKLWan,
        "text_encoder": UMT5EncoderModel,
    }

    def __init__(self, family: Family = WAN_2_1) -> None:
        super().__init__(family)
        self.settings = SETTINGS_5B if family.geometry == WAN_2_2_5B.geometry else SETTINGS

    def load_tokenizer(self, part: str, folder: Path) -> PreTrainedTokenizerBase:
        """Load UMT5's tokenizer, from the published tokenizer.json.

        Raises:
            WeightsError: the folder has none, or it cannot be loaded.
        """
        return load_tokenizer(folder, self.family.vocabularies)

    def finish(self, part: str, model: Any) -> None:
        """Compute the transformer's tables of angles, which no file has."""
        if part in self.family.transformers:
            model.remake_rope()

    def longest_text(self, transformer: PusaWanTransformer3DModel, batch: int) -> TextFeatures:
        """Return features of 512 tokens on the transformer's device, without meaningful values."""
        shape = (batch, TEXT_TOKENS, transformer.config.text_dim)
        features = torch.empty(shape, dtype=transformer.dtype, device=transformer.device)
        return TextFeatures(features, torch.ones(shape[:2], dtype=torch.bool, device=transformer.device))

    @torch.no_grad()
    def encode_text(self, parts: Mapping[str, Any], prompts: Sequence[str], padded: bool = True) -> TextFeatures:
        """Encode prompts to UMT5 features (B, L, width) and mask (B, L). An empty prompt has one valid token, "</s>".

        Features after the valid ones are zero, and the transformer attends to them as well: how many there are is part
        of the function that it was trained as. So what it is given has always the L of `padded`: 512, or the
        tokenizer's own limit. Without `padded` L is the length of the longest prompt, and zeros must be added.

        Raises:
            WeightsError: the tokenizer gives tokens that the text encoder does not know.
        """
        model = parts["text_encoder"]
        ids, mask = tokenize(parts["tokenizer"], model, [clean_prompt(text) for text in prompts], TEXT_TOKENS, padded)
        features = model(ids, attention_mask=mask).last_hidden_state
        return TextFeatures(features.masked_fill(~mask[..., None], 0), mask)

    @torch.no_grad()
    def encode_video(self, vae: PusaAutoencoderKLWan, x_BCTHW: Tensor, tile: int = 0) -> tuple[Tensor, Tensor]:
        """Encode uint8 frames or pixels in [-1, 1] to posterior mean and log-variance, each (B, C, F, h, w).

        Tiles overlap by a quarter.

        Raises:
            ConditionError: the number of frames is not 4k + 1, or the VAE would drop pixels.
        """
        at_once = self.chunk_length(len(x_BCTHW) * x_BCTHW[0, 0, 0].numel() * self.geometry.temporal)
        moments = torch.cat(list(vae.encode_chunks(x_BCTHW, at_once, tile)), 2)
        posterior = DiagonalGaussianDistribution(moments)
        return posterior.mean.float(), posterior.logvar.float()

    def predict(
        self,
        transformer: PusaWanTransformer3DModel,
        z_BCFhw: Tensor,
        sigma_BF: Tensor,
        text: TextFeatures,
        embedded_guidance: float | None = None,
    ) -> Tensor:
        """Predict the velocity x0 - eps. Wan's own is eps - x0, and its timestep is t = 1000 * sigma.

        All rows of the text are attended to: they must be as many as `encode_text` gives with `padded`.
        """
        velocity: Tensor = transformer(
            hidden_states=z_BCFhw,
            encoder_hidden_states=text.features,
            timestep=1000 * sigma_BF.float(),
            return_dict=False,
        )[0]
        return -velocity.float()


def clean_prompt(text: str) -> str:
    """Return a prompt as UMT5 was given its training texts: mojibake repaired, HTML unescaped, blanks collapsed."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()
