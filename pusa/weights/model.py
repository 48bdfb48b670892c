"""A base model in use: its parts, each loaded on first use, and the way between frames and latents."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pusa.backbones.base import Backbone, find_backbone
from pusa.diffusion.latent_spaces import LATENT_SPACES, LatentSpace
from pusa.diffusion.sampler import TextFeatures
from pusa.manifest.models import ModelSpec
from pusa.weights.load import load_part
from pusa.weights.resolve import latent_space, locate_part
from pusa.weights.source import PartFiles


class Model:
    """The model of a manifest's `model:`. With `offload`, only one part at a time is on the device.

    Args:
        spec: the manifest's `model:`.
        device: the device of the parts; default: the first CUDA device if there is one, else the CPU.

    Raises:
        WeightsError: on the first use of a part that is missing or does not fit.
    """

    def __init__(self, spec: ModelSpec, device: str | torch.device | None = None) -> None:
        self.spec = spec
        self.backbone: Backbone = find_backbone(spec.backbone)
        self.device = default_device() if device is None else torch.device(device)
        self.dtype = default_dtype(self.device)
        self._files: dict[str, PartFiles] = {}
        self._loaded: dict[str, nn.Module] = {}

    def files_of(self, part: str) -> PartFiles:
        """Return the files of a part; those on a hub are downloaded."""
        if part not in self._files:
            self._files[part] = locate_part(self.spec, part)
        return self._files[part]

    def fingerprints(self, *parts: str) -> dict[str, str]:
        """Return part -> the hash of its files, for the given parts or for all."""
        return {part: self.files_of(part).fingerprint() for part in parts or self.backbone.family.parts}

    @cached_property
    def space_name(self) -> str:
        """Return the name of the transformer's latent space, "dit" or "vae"."""
        return latent_space(self.spec, self.files_of("transformer"))

    @cached_property
    def space(self) -> LatentSpace:
        """Return the transformer's latent space, with the VAE's statistics."""
        mean, std = self.backbone.latent_statistics(self.vae)
        return LATENT_SPACES[self.space_name](mean, std)

    @property
    def transformer(self) -> Any:
        """Return the vectorized denoiser for inference."""
        return self._on_device("transformer")

    @property
    def vae(self) -> Any:
        """Return the video autoencoder."""
        return self._on_device("vae")

    @property
    def text_parts(self) -> dict[str, Any]:
        """Return the tokenizers and text encoders by name, ready for `Backbone.encode_text`."""
        family = self.backbone.family
        return self._tokenizers | {part: self._on_device(part) for part in family.text_encoders}

    def trainable_transformer(self) -> Any:
        """Load a second copy of the denoiser for training: fp32 weights, in training mode."""
        loaded = load_part(self.backbone, self.files_of("transformer"), torch.float32)
        return loaded.to(self.device).train().requires_grad_(True)

    def encode_text(self, prompts: Sequence[str], padded: bool = True) -> TextFeatures:
        """Return the features of prompts; an empty prompt is the null prompt.

        Without `padded`, they are as long as the longest prompt.
        """
        return self.backbone.encode_text(self.text_parts, prompts, padded)

    def posterior(self, frames_BTHWC: np.ndarray) -> tuple[Tensor, Tensor]:
        """Encode uint8 frames to posterior mean and log-variance (B, C, F, h, w) in the VAE's own space, on the CPU."""
        x_BCTHW = torch.from_numpy(frames_BTHWC).movedim(-1, 1).float() / 127.5 - 1
        mean, logvar = self.backbone.encode_video(self.vae, x_BCTHW)
        return mean.cpu(), logvar.cpu()

    def encode(self, frames_THWC: np.ndarray) -> Tensor:
        """Encode uint8 frames to latents (C, F, h, w) in the transformer's space: the posterior's mean."""
        return self.space.enter(self.posterior(frames_THWC[None])[0][0])

    def decode(self, z_CFhw: Tensor) -> np.ndarray:
        """Decode latents (C, F, h, w) in the transformer's space to frames (T, H, W, 3) uint8."""
        return self.decode_stored(self.space.leave(z_CFhw.cpu()))

    def decode_stored(self, z_CFhw: Tensor) -> np.ndarray:
        """Decode latents (C, F, h, w) in the VAE's own space, as tables store them, to frames (T, H, W, 3) uint8."""
        x_BCTHW = self.backbone.decode_video(self.vae, z_CFhw[None])
        return ((x_BCTHW + 1) * 127.5).round().to(torch.uint8).movedim(1, -1)[0].cpu().numpy()

    def decode_ring(self, z_CFhw: Tensor) -> np.ndarray:
        """Decode a ring of latents to the frames (temporal * F, H, W, 3) uint8 of a loop.

        The ring is decoded twice in a row and the second round is kept, so that its first frame follows the last one.
        The loop starts in the middle of a latent frame: between two latent frames the video changes a little more,
        which would show where the loop closes.
        """
        temporal = self.backbone.geometry.temporal
        frames = self.decode(torch.cat([z_CFhw, z_CFhw], 1))[-temporal * z_CFhw.shape[1] :]
        return np.roll(frames, -(temporal // 2), 0)

    @cached_property
    def _tokenizers(self) -> dict[str, Any]:
        parts = self.backbone.family.tokenizers
        return {part: self.backbone.load_tokenizer(part, self.files_of(part).paths[0]) for part in parts}

    def _on_device(self, part: str) -> Any:
        if part not in self._loaded:
            self._loaded[part] = load_part(self.backbone, self.files_of(part), self.dtype)
        if self.spec.offload:
            for other, module in self._loaded.items():
                if other != part:
                    module.to("cpu")
        return self._loaded[part].to(self.device)


def default_device() -> torch.device:
    """Return the first CUDA device if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """Return bf16 for a GPU, as the base models were trained, and fp32 for a CPU, where bf16 is no faster."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32
