"""Define what Pusa asks of a base model: encode, decode, and predict a velocity from per-frame levels.

Shapes: B batch, C latent channels, F latent frames, h, w latent height and width; T, H, W frames, height, width; L text
tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from pusa.backbones import find_family
from pusa.backbones.context import Context
from pusa.backbones.family import Family, Geometry
from pusa.backbones.settings import Settings
from pusa.diffusion.sampler import TextFeatures
from pusa.registry import find

FRAMES_AT_ONCE = 12  # latent frames, however small: more are no faster, and would let memory grow with the length


class TrainableTransformer(Protocol):
    """What the trainer asks of a vectorized transformer, beside being a diffusers model."""

    checkpoint_every_nth_block: int  # with activation checkpointing: 1 recomputes every block, 2 every second one

    @property
    def blocks(self) -> nn.ModuleList:
        """Return the repeated blocks, which are sharded, compiled and recomputed one by one."""

    def share_frames(self, context: Context) -> None:
        """Compute only this process's latent frames; inputs and outputs stay whole.

        Raises:
            ConditionError: the attention heads cannot be split over the processes of the context.
        """


class Backbone(ABC):
    """One family of base models, or several of one architecture. An instance holds no weights: methods take the parts.

    Args:
        family: one of the families that the class adapts; default: the class's own `family`.
    """

    family: Family
    classes: ClassVar[Mapping[str, Any]]  # the class of each part that has weights, the transformer's vectorized
    settings: Mapping[str, type[Settings]]  # the ranges of each of their settings
    pixels_at_once: ClassVar[int]  # of all frames that the VAE works on at a time, as memory allows
    # The side in pixels of the tiles that the VAE always works in, of `frames_at_once` latent frames, on which latents
    # depend; 0: it has none, and `frames_at_once` does not change results.
    own_tile: ClassVar[int] = 0

    def __init__(self, family: Family | None = None) -> None:
        if family is not None:
            self.family = family

    @property
    def geometry(self) -> Geometry:
        """Return how pixels become latents."""
        return self.family.geometry

    @abstractmethod
    def load_tokenizer(self, part: str, folder: Path) -> Any:
        """Load a tokenizer.

        Raises:
            WeightsError: the folder holds none of the known kind.
        """

    def finish(self, part: str, model: Any) -> None:  # noqa: B027  most families have nothing to do
        """Compute what a part holds besides its weights, such as tables of angles, after the weights were loaded."""

    @abstractmethod
    def longest_text(self, transformer: Any, batch: int) -> TextFeatures:
        """Return features of the most tokens the family allows, without meaningful values, to try a size with."""

    @abstractmethod
    def encode_text(self, parts: Mapping[str, Any], prompts: Sequence[str], padded: bool = True) -> TextFeatures:
        """Encode prompts; an empty prompt is the null prompt.

        Args:
            parts: the loaded `family.text_parts` by name.
            prompts: B texts.
            padded: pad to the family's full length; otherwise to the longest prompt of the batch.
        """

    def drop_text(self, text: TextFeatures, kept_B: Tensor, null: TextFeatures) -> TextFeatures:
        """Return the features with those of dropped samples replaced by what caption dropout trains the model on.

        By default that is zero features without valid tokens, as in the published Pusa training.

        Args:
            text: the features of B texts.
            kept_B: false for each text to replace.
            null: the encoded empty prompt, (1, L, width).
        """
        kept_B1 = kept_B[:, None]
        pooled = None if text.pooled is None else text.pooled * kept_B1
        return TextFeatures(text.features * kept_B1[..., None], text.mask & kept_B1, pooled)

    @abstractmethod
    def encode_video(self, vae: Any, x_BCTHW: Tensor, tile: int = 0) -> tuple[Tensor, Tensor]:
        """Encode pixels to posterior mean and log-variance (B, C, F, h, w), in the VAE's own space.

        Args:
            vae: the loaded VAE.
            x_BCTHW: frames in uint8, which become floats chunk by chunk, or floats in [-1, 1].
            tile: side in pixels of tiles that are encoded one by one, to save memory; 0 for no tiles, or `own_tile`.
        """

    @torch.no_grad()
    def decode_video(self, vae: Any, z_BCFhw: Tensor, at_once: int | None = None, tile: int = 0) -> Iterator[Tensor]:
        """Decode latents in the VAE's own space; yield pixels in [-1, 1], (B, 3, t, H, W), as they are made.

        Args:
            vae: the loaded VAE, with a method `decode_chunks(z, latent_frames, tile)`.
            z_BCFhw: the latents.
            at_once: how many latent frames are decoded at a time, which does not change the result; default:
                `frames_at_once`.
            tile: side in pixels of tiles that are decoded one by one, to save memory; 0 for no tiles, or `own_tile`.
        """
        at_once = self.frames_at_once(z_BCFhw) if at_once is None else at_once
        chunks = vae.decode_chunks(z_BCFhw.to(vae.device, vae.dtype), at_once, tile)
        yield from map(lambda x_BCTHW: x_BCTHW.float().clamp(-1, 1), chunks)  # a `for` would keep the chunk before

    def frames_at_once(self, z_BCFhw: Tensor) -> int:
        """Return how many latent frames to decode at a time, at most F, while memory does not run out."""
        pixels = len(z_BCFhw) * z_BCFhw[0, 0, 0].numel() * self.geometry.spatial**2 * self.geometry.temporal
        return min(z_BCFhw.shape[2], self.chunk_length(pixels))

    def chunk_length(self, pixels: int) -> int:
        """Return how many latent frames the VAE works on at a time, each of `pixels` in all samples and frames."""
        return min(FRAMES_AT_ONCE, max(1, self.pixels_at_once // pixels))

    def latent_statistics(self, vae: Any) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of each channel of the VAE's output, each (C, 1, 1, 1)."""
        view = (-1, 1, 1, 1)
        return torch.tensor(vae.config.latents_mean).view(view), torch.tensor(vae.config.latents_std).view(view)

    @abstractmethod
    def predict(
        self,
        transformer: Any,
        z_BCFhw: Tensor,
        sigma_BF: Tensor,
        text: TextFeatures,
        embedded_guidance: float | None = None,
    ) -> Tensor:
        """Predict the velocity x0 - eps (B, C, F, h, w) in fp32, whatever sign and clock the model itself uses.

        Args:
            transformer: the loaded transformer.
            z_BCFhw: the noisy latents.
            sigma_BF: their levels.
            text: the features of B texts.
            embedded_guidance: the number that a model distilled with guidance is given; None: the family's default.
                Other families disregard it.
        """


def find_backbone(name: str) -> Backbone:
    """Return the backbone of a family.

    Raises:
        ManifestError: no family has this name.
    """
    family = find_family(name)
    backbone: Backbone = find({name: family.backbone}, name, "backbone")(family)
    return backbone
