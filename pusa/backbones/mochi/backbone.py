"""Mochi put to use: its tokenizer, text encoder, VAE and clock, as Pusa asks for them."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, T5EncoderModel, T5Tokenizer
from transformers.utils import logging as transformers_logging

from pusa.backbones.base import Backbone
from pusa.backbones.family import GEOMETRIES
from pusa.backbones.mochi.transformer import PusaMochiTransformer3DModel
from pusa.backbones.mochi.vae import PusaAutoencoderKLMochi
from pusa.diffusion.sampler import TextFeatures
from pusa.errors import WeightsError
from pusa.weights.hub import VOCABULARIES
from pusa.weights.source import Source

log = logging.getLogger(__name__)
TEXT_TOKENS = 256
PIXELS_AT_ONCE = 2 * 6 * 848 * 480  # two latent frames at the published size: the VAE works in about 11 GiB, in bf16


class Mochi(Backbone):
    """genmo's Mochi 1 (and `builtin:tiny`, the same classes at tiny size), from a folder in diffusers layout."""

    geometry = GEOMETRIES["mochi"]

    classes = {  # noqa: RUF012
        "transformer": PusaMochiTransformer3DModel,
        "vae": PusaAutoencoderKLMochi,
        "text_encoder": T5EncoderModel,
    }

    def load_tokenizer(self, source: Source) -> PreTrainedTokenizerBase:
        """T5's."""
        transformers_logging.disable_progress_bar()  # loading T5 would tear the stage's own
        there = [name for name in VOCABULARIES if (source.paths[0] / name).is_file()]
        if not there:
            # transformers would make up a vocabulary that knows no word
            raise WeightsError(f"{source} has no vocabulary; wanted is one of {', '.join(VOCABULARIES)}")
        # Never AutoTokenizer: of a folder that names code of its own it asks on standard input whether to run that.
        tokenizer_class = PreTrainedTokenizerFast if there[0] == "tokenizer.json" else T5Tokenizer
        try:
            return tokenizer_class.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise WeightsError(f"{source} cannot be loaded as a tokenizer: {error}") from error

    def longest_text(self, transformer: PusaMochiTransformer3DModel, batch: int) -> TextFeatures:
        """256 tokens, on the transformer's device and empty of meaning."""
        shape = (batch, TEXT_TOKENS, transformer.config.text_embed_dim)
        features = torch.empty(shape, dtype=transformer.dtype, device=transformer.device)
        return TextFeatures(features, torch.ones(shape[:2], dtype=torch.bool, device=transformer.device))

    @torch.no_grad()
    def encode_text(
        self, encoder: tuple[PreTrainedTokenizerBase, T5EncoderModel], prompts: Sequence[str], padded: bool = True
    ) -> TextFeatures:
        """T5 features (B, L, width) and mask (B, L). An empty prompt is T5 of zeroed ids with nothing valid.

        L is 256, or that of the longest prompt if not `padded`: the valid features are the same.
        """
        tokenizer, model = encoder
        limit = min(TEXT_TOKENS, tokenizer.model_max_length)
        for prompt, ids in zip(prompts, tokenizer(list(prompts), verbose=False).input_ids, strict=True):
            if len(ids) > limit:
                log.warning("a prompt is cut to the first %d of its %d tokens: %.80r", limit, len(ids), prompt)
        tokens = tokenizer(
            list(prompts),
            padding="max_length" if padded else "longest",
            max_length=limit,
            truncation=True,
            return_tensors="pt",
        ).to(model.device)
        empty = torch.tensor([not prompt.strip() for prompt in prompts], device=model.device)[:, None]
        ids = tokens.input_ids.masked_fill(empty, 0)
        mask = tokens.attention_mask.bool() & ~empty
        return TextFeatures(model(ids, attention_mask=mask).last_hidden_state, mask)

    @torch.no_grad()
    def encode_video(self, vae: PusaAutoencoderKLMochi, x_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels in [-1, 1] -> posterior mean and log-variance, each (B, C, F, h, w), in the VAE's own space."""
        vae.latent_frames_at_once = self._at_once(len(x_BCTHW) * x_BCTHW[0, 0, 0].numel())
        posterior = vae.encode(x_BCTHW.to(vae.device, vae.dtype)).latent_dist
        return posterior.mean.float(), posterior.logvar.float()

    @torch.no_grad()
    def decode_video(self, vae: PusaAutoencoderKLMochi, z_BCFhw: Tensor) -> Tensor:
        """Latents in the VAE's own space -> pixels in [-1, 1], (B, 3, T, H, W)."""
        vae.latent_frames_at_once = self._at_once(len(z_BCFhw) * z_BCFhw[0, 0, 0].numel() * self.geometry.spatial**2)
        return vae.decode(z_BCFhw.to(vae.device, vae.dtype)).sample.float().clamp(-1, 1)

    def _at_once(self, pixels: int) -> int:
        """How many latent frames of so many pixels a frame the VAE should take at a time; the result is the same."""
        return max(1, PIXELS_AT_ONCE // (pixels * self.geometry.temporal))

    def latent_statistics(self, vae: PusaAutoencoderKLMochi) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel of the VAE's output, each (C, 1, 1, 1)."""
        view = (-1, 1, 1, 1)
        return torch.tensor(vae.config.latents_mean).view(view), torch.tensor(vae.config.latents_std).view(view)

    def predict(
        self, transformer: PusaMochiTransformer3DModel, z_BCFhw: Tensor, sigma_BF: Tensor, text: TextFeatures
    ) -> Tensor:
        """The velocity x0 - eps; Mochi's clock is t = 1000 * (1 - sigma)."""
        return transformer(
            hidden_states=z_BCFhw,
            encoder_hidden_states=text.features,
            timestep=1000 * (1 - sigma_BF),
            encoder_attention_mask=text.mask,
            return_dict=False,
        )[0].float()
