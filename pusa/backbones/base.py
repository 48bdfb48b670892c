"""What Pusa asks of a base model: load its parts, encode, decode, and predict a velocity from per-frame levels."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from pusa.errors import ConditionError, WeightsError
from pusa.weights.load import load_files
from pusa.weights.source import Source


@dataclass(frozen=True)
class Geometry:
    """How pixels become latents: compression in space and time, the transformer's patch, and latent channels."""

    spatial: int
    temporal: int
    patch: int
    channels: int

    @property
    def pixel_step(self) -> int:
        """Width and height must be multiples of this."""
        return self.spatial * self.patch

    def latent_frames(self, num_frames: int) -> int:
        """Latent frames F of a clip of `num_frames` = temporal * (F - 1) + 1 frames."""
        return (num_frames - 1) // self.temporal + 1

    def num_frames(self, latent_frames: int) -> int:
        """Frames that `latent_frames` decode to."""
        return self.temporal * (latent_frames - 1) + 1

    def frames_of(self, latent_frame: int) -> list[int]:
        """The frames of a clip that a latent frame stands for: the first for one, each other for `temporal`."""
        end = self.num_frames(latent_frame + 1)
        return list(range(max(0, end - self.temporal), end))

    def frames_of_ring(self, latent_frame: int, latent_frames: int) -> list[int]:
        """The same in a loop of so many latent frames, which `Model.decode_ring` starts in the middle of the first."""
        first = latent_frame * self.temporal - self.temporal // 2
        return [(first + i) % (latent_frames * self.temporal) for i in range(self.temporal)]

    def latent_shape(self, width: int, height: int, num_frames: int) -> tuple[int, int, int, int]:
        """(C, F, h, w)."""
        return self.channels, self.latent_frames(num_frames), height // self.spatial, width // self.spatial

    def check(self, width: int, height: int, num_frames: int) -> None:
        """Refuse what the model cannot take.

        Raises:
            ConditionError: all that is wrong, with the nearest legal sizes and the two nearest legal lengths.
        """
        wrong = [self._wrong_size(name, value) for name, value in (("width", width), ("height", height))]
        try:
            self.check_length("num_frames", num_frames)
        except ConditionError as error:
            wrong.append(str(error))
        if any(wrong):
            raise ConditionError("; ".join(filter(None, wrong)))

    def check_length(self, name: str, num_frames: int) -> None:
        """Refuse a number of frames that no clip has.

        Raises:
            ConditionError: the two nearest.
        """
        if num_frames < 1 or (num_frames - 1) % self.temporal:
            below = max(0, num_frames - 1) // self.temporal * self.temporal + 1
            legal = f"{self.temporal}k + 1; the nearest are {below} and {below + self.temporal}"
            raise ConditionError(f"{name} {num_frames} is not {legal}")

    def _wrong_size(self, name: str, value: int) -> str:
        if value >= self.pixel_step and value % self.pixel_step == 0:
            return ""
        nearest = max(self.pixel_step, round(value / self.pixel_step) * self.pixel_step)
        return f"{name} {value} is not a multiple of {self.pixel_step}; the nearest is {nearest}"


@dataclass(frozen=True)
class TextFeatures:
    """Text features (B, L, width) and the mask (B, L) of the tokens that count."""

    features: Tensor
    mask: Tensor


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
        """A part, for use as it is; on any doubt about a name or a shape the whole is refused.

        Raises:
            WeightsError: there is no such part, or its weights do not fit the class.
        """
        model_class = self.classes[part]
        model = (
            _from_folder(model_class, source.folder, dtype) if source.folder else load_files(model_class, source, dtype)
        )
        return model.eval().requires_grad_(False)


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
