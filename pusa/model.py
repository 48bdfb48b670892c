"""A base model put to use: its parts, each loaded when first asked for, and what lies between frames and latents."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pusa.backbones import BACKBONES
from pusa.backbones.base import Backbone, TextFeatures
from pusa.manifest import ModelSpec
from pusa.tables import find
from pusa.weights.resolve import fingerprint, part_folder, resolve, transformer_folder

ENCODERS = ("vae", "text_encoder", "tokenizer")


class Model:
    """What a manifest's `model:` names.

    Raises:
        WeightsError: it is not there; or, when a part is first used, that part does not fit.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self.backbone: Backbone = find(BACKBONES, spec.backbone, "backbone")()
        self.device = default_device()
        self.dtype = default_dtype(self.device)
        base = resolve(spec.weights)
        self._folders = {part: part_folder(base, part) for part in ENCODERS}
        self._folders["transformer"] = part_folder(transformer_folder(spec), "transformer")

    def fingerprints(self, *parts: str) -> dict[str, str]:
        """Part -> the hash of its files; of all parts where none is named."""
        return {part: fingerprint(self._folders[part] / part) for part in parts or self._folders}

    @cached_property
    def transformer(self) -> Any:
        """The vectorized denoiser, for use as it is."""
        return self.backbone.load_transformer(str(self._folders["transformer"]), self.dtype).to(self.device)

    def trainable_transformer(self) -> Any:
        """A denoiser of its own to be trained: fp32 weights, in training mode."""
        loaded = self.backbone.load_transformer(str(self._folders["transformer"]), torch.float32)
        return loaded.to(self.device).train().requires_grad_(True)

    @cached_property
    def vae(self) -> Any:
        """The video autoencoder."""
        return self.backbone.load_vae(str(self._folders["vae"]), self.dtype).to(self.device)

    @cached_property
    def text_encoder(self) -> Any:
        """The tokenizer and the text encoder."""
        tokenizer, encoder = self.backbone.load_text_encoder(str(self._folders["text_encoder"]), self.dtype)
        return tokenizer, encoder.to(self.device)

    def encode_text(self, prompts: Sequence[str]) -> TextFeatures:
        """Features of prompts; an empty one is the null prompt."""
        return self.backbone.encode_text(self.text_encoder, prompts)

    def posterior(self, frames_BTHWC: np.ndarray) -> tuple[Tensor, Tensor]:
        """uint8 frames -> posterior mean and log-variance (B, C, F, h, w) in the VAE's own space, on the CPU."""
        x_BCTHW = torch.from_numpy(frames_BTHWC).movedim(-1, 1).float() / 127.5 - 1
        mean, logvar = self.backbone.encode_video(self.vae, x_BCTHW)
        return mean.cpu(), logvar.cpu()

    def encode(self, frames_THWC: np.ndarray) -> Tensor:
        """uint8 frames -> latents (C, F, h, w) in the transformer's space: the posterior's mean, normalised."""
        shift, scale = self.backbone.latent_statistics(self.vae)
        return ((self.posterior(frames_THWC[None])[0] - shift) / scale)[0]

    def decode(self, z_CFhw: Tensor) -> np.ndarray:
        """Latents (C, F, h, w) in the transformer's space -> frames (T, H, W, 3) uint8."""
        shift, scale = self.backbone.latent_statistics(self.vae)
        x_BCTHW = self.backbone.decode_video(self.vae, z_CFhw.cpu()[None] * scale + shift)
        return ((x_BCTHW + 1) * 127.5).round().to(torch.uint8).movedim(1, -1)[0].cpu().numpy()


def default_device() -> torch.device:
    """The first CUDA device where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """bf16 on a GPU, as the base models were trained; fp32 on a CPU, which gains nothing from less."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32
