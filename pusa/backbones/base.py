"""What Pusa asks of a base model: load its parts, encode, decode, and predict a velocity from per-frame levels."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from pusa.backbones.family import Geometry
from pusa.diffusion.sampler import TextFeatures
from pusa.errors import WeightsError
from pusa.weights.load import load_files
from pusa.weights.lora import added
from pusa.weights.source import Source


class Backbone(ABC):
    """One family of base models. Instances hold no weights; what `load` returns is handed back to the other calls."""

    geometry: Geometry

    @property
    @abstractmethod
    def classes(self) -> dict[str, Any]:
        """The class of each part that has weights: "transformer" (the vectorized one), "vae", "text_encoder"."""

    @abstractmethod
    def load_tokenizer(self, source: Source) -> Any:
        """The tokenizer that goes with the text encoder."""

    @abstractmethod
    def longest_text(self, transformer: Any, batch: int) -> TextFeatures:
        """Features of as many tokens as the family allows, to try a size with: their values mean nothing."""

    @abstractmethod
    def encode_text(self, encoder: Any, prompts: Sequence[str], padded: bool = True) -> TextFeatures:
        """Features of prompts; an empty prompt is the null prompt. Not `padded`, as long as the longest of them."""

    @abstractmethod
    def encode_video(self, vae: Any, x_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels in [-1, 1] -> posterior mean and log-variance (B, C, F, h, w), in the VAE's own space."""

    @abstractmethod
    def decode_video(self, vae: Any, z_BCFhw: Tensor) -> Tensor:
        """Latents in the VAE's own space -> pixels in [-1, 1] (B, 3, T, H, W)."""

    @abstractmethod
    def latent_statistics(self, vae: Any) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel of the VAE's output, each (C, 1, 1, 1)."""

    @abstractmethod
    def predict(self, transformer: Any, z_BCFhw: Tensor, sigma_BF: Tensor, text: TextFeatures) -> Tensor:
        """The velocity x0 - eps (B, C, F, h, w) in fp32, whatever the model's own sign and clock are."""

    def load(self, part: str, source: Source, dtype: torch.dtype) -> Any:
        """A part, for use as it is, a LoRA added to its weights; on any doubt about a name or a shape all is refused.

        Raises:
            WeightsError: there is no such part, its weights do not fit the class, or a LoRA does not fit them.
        """
        model_class, layers = self.classes[part], source.additions()
        model = (
            _from_folder(model_class, source.folder, dtype) if source.folder else load_files(model_class, source, dtype)
        )
        model = model.eval().requires_grad_(False)
        weights = dict(model.named_parameters())
        for name, layer in layers.items():
            weights[name].copy_(added(name, weights[name], layer))
        return model


def _from_folder(model_class: Any, folder: Path, dtype: torch.dtype) -> Any:
    if not (folder / "config.json").is_file():
        raise WeightsError(f"{folder} has no config.json; expected is a part of a model in diffusers layout")
    variant = "bf16" if any(folder.glob("*.bf16*")) else None
    try:
        model, info = model_class.from_pretrained(
            folder, torch_dtype=dtype, output_loading_info=True, local_files_only=True, use_safetensors=True,
            variant=variant,
        )  # fmt: skip
    except (OSError, RuntimeError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise WeightsError(f"{folder} cannot be loaded as {model_class.__name__}: {error}") from error
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if wrong:
        raise WeightsError(f"{folder} does not fit {model_class.__name__}: {wrong}")
    return model
