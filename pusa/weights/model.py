"""A base model in use: its parts, each loaded on first use, and the way between frames and latents."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pusa.backbones import find_family
from pusa.backbones.base import Backbone, find_backbone
from pusa.diffusion.latent_spaces import LATENT_SPACES, LatentSpace
from pusa.diffusion.sampler import Phase, TextFeatures, split_phases
from pusa.diffusion.windows import Timeline
from pusa.errors import WeightsError
from pusa.manifest.models import ModelSpec
from pusa.weights.load import load_part, part_settings
from pusa.weights.memory import VideoDecoder, VideoEncoder
from pusa.weights.resolve import boundary, is_here, latent_space, locate_part, require_one_space, without_loras
from pusa.weights.source import FileState, PartFiles

KnownFiles = tuple[dict[str, tuple[FileState, ...]], dict[str, str]]  # by part: states of its files, and fingerprint


class Model:
    """The model of a manifest's `model:`. With `offload`, only one part, or all text encoders, are on the device.

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
        self.loading: Callable[[str], AbstractContextManager[None]] = lambda part: (
            nullcontext()
        )  # around the loading of each part
        self._files: dict[str, PartFiles] = {}
        self._states: dict[str, tuple[FileState, ...]] = {}  # of each part, when it was first read
        self._fingerprints: dict[str, str] = {}
        self._loaded: dict[str, nn.Module] = {}

    def files_of(self, part: str) -> PartFiles:
        """Return the files of a part; those on a hub are downloaded."""
        if part not in self._files:
            self._files[part] = locate_part(self.spec, part)
        return self._files[part]

    def dtype_of(self, part: str) -> torch.dtype:
        """Return the dtype in which a part computes."""
        return part_dtype(self.spec, part, self.dtype)

    @contextmanager
    def reading(self, part: str) -> Iterator[PartFiles]:
        """Yield the files of a part to read, and check afterwards that they are those of every earlier reading.

        So what is loaded is what `fingerprints` hashed, whichever was first.

        Raises:
            WeightsError: a file was changed or replaced.
        """
        files = self.files_of(part)
        before = self._states.setdefault(part, files.states())
        yield files
        if (now := files.states()) == before:
            return
        # Some network file systems give a file another inode each time, and other programs change the ctime by a new
        # link to the file or another mode. So the content decides, where its hash is known.
        if files.fingerprint() != self._fingerprints.get(part):
            raise WeightsError(f"{part} {files} was changed while it was used; run again")
        self._states[part] = now

    def fingerprints(self, *parts: str) -> dict[str, str]:
        """Return part -> the hash of its files, for the given parts or for all.

        The settings are checked, too: a VAE of another family would else be refused only when all is sampled.

        Raises:
            WeightsError: a part is missing, is not of the family, or was changed since it was first read.
        """
        for part in (parts := parts or self.backbone.family.parts):
            with self.reading(part) as files:
                if part in self.backbone.settings:
                    part_settings(self.backbone, files)
                found = files.fingerprint()
            self._fingerprints[part] = found  # `reading` has compared it with an earlier one
        return {part: self._fingerprints[part] for part in parts}

    def known(self) -> KnownFiles:
        """Return what was found out about the files of each part so far, for a model of another process to expect."""
        return dict(self._states), dict(self._fingerprints)

    def expect(self, known: KnownFiles) -> None:
        """Take over what another model found out about the same files: they are hashed once, and must be those."""
        states, fingerprints = known
        self._states.update(states)
        self._fingerprints.update(fingerprints)

    @cached_property
    def space_name(self) -> str:
        """Return the name of the latent space, "dit" or "vae", which all transformers share.

        Raises:
            WeightsError: two transformers have different ones.
        """
        spaces = {part: self.space_of(part) for part in self.backbone.family.transformers}
        require_one_space(spaces)
        return next(iter(spaces.values()))

    def space_of(self, part: str) -> str:
        """Return the name of the latent space of one transformer."""
        with self.reading(part) as files:
            return latent_space(self.spec, files)

    @cached_property
    def lineage(self) -> dict[str, list[dict[str, Any]]]:
        """Return what the files of transformers and VAEs record about themselves, by part; nothing is loaded."""
        return {
            part: self.files_of(part).lineage()
            for part in (*self.backbone.family.transformers, *self.backbone.family.vaes)
        }

    @cached_property
    def boundary(self) -> float | None:
        """Return the level from which on the first of two transformers denoises; None with one transformer."""
        return boundary(self.spec)

    @cached_property
    def space(self) -> LatentSpace:
        """Return the transformer's latent space, with the VAE's statistics."""
        mean, std = self.backbone.latent_statistics(self.vae)
        return LATENT_SPACES[self.space_name](mean, std)

    @property
    def transformer(self) -> Any:
        """Return the vectorized denoiser for inference, of a family with one."""
        (part,) = self.backbone.family.transformers
        return self._on_device(part)

    def denoiser(self, expert: int) -> Any:
        """Return the vectorized denoiser for the steps of a phase, by its number of the expert."""
        return self._on_device(self.backbone.family.transformers[expert])

    def phases(self, levels_NF: Tensor, timeline: Timeline) -> list[Phase]:
        """Return the phases of a sampling run, in each of which one transformer denoises.

        Args:
            levels_NF: the schedule's own levels (N + 1, F), which it has for frames of multiplier 1.
            timeline: when each frame starts, and what the network sees.
        """
        return split_phases(levels_NF, timeline, self.boundary)

    @property
    def vae(self) -> Any:
        """Return the video autoencoder."""
        return self._on_device("vae")

    @property
    def text_parts(self) -> Mapping[str, Any]:
        """Return the tokenizers and text encoders by name, ready for `Backbone.encode_text`."""
        family = self.backbone.family
        return self._tokenizers | {part: self._on_device(part) for part in family.text_encoders}

    def encode_text(self, prompts: Sequence[str], padded: bool = True) -> TextFeatures:
        """Return the features of prompts; an empty prompt is the null prompt.

        Without `padded`, they are as long as the longest prompt.
        """
        return self.backbone.encode_text(self.text_parts, prompts, padded)

    def posterior(self, frames_BTHWC: np.ndarray, tile: int = 0) -> tuple[Tensor, Tensor]:
        """Encode uint8 frames to posterior mean and log-variance (B, C, F, h, w) in the VAE's own space, on the CPU.

        With `tile`, in tiles of this many pixels a side.
        """
        x_BCTHW = torch.from_numpy(frames_BTHWC).movedim(-1, 1)
        mean, logvar = self.backbone.encode_video(self.vae, x_BCTHW, tile)
        return mean.cpu(), logvar.cpu()

    def encode(self, frames_THWC: np.ndarray) -> Tensor:
        """Encode uint8 frames to latents (C, F, h, w) in the transformer's space: the posterior's mean.

        Raises:
            NoMemoryError: they do not fit in memory, not even in tiles.
        """
        return self.space.enter(self._encoder.encode(frames_THWC[None])[0][0])

    def decode_chunks(self, z_CFhw: Tensor) -> Iterator[np.ndarray]:
        """Decode latents (C, F, h, w) in the transformer's space; yield frames (t, H, W, 3) uint8 as they are made.

        Raises:
            NotFiniteError: the VAE gives values that are not finite, which would pass for black.
            NoMemoryError: they do not fit in memory, not even one latent frame in tiles.
        """
        return self._decoder.decode(self.space.leave(z_CFhw.cpu()))

    def decode(self, z_CFhw: Tensor) -> np.ndarray:
        """Decode latents (C, F, h, w) in the transformer's space to frames (T, H, W, 3) uint8."""
        return np.concatenate(list(self.decode_chunks(z_CFhw)))

    def decode_stored(self, z_CFhw: Tensor) -> np.ndarray:
        """Decode latents (C, F, h, w) in the VAE's own space, as tables store them, to frames (T, H, W, 3) uint8."""
        return np.concatenate(list(self._decoder.decode(z_CFhw)))

    def decode_ring_chunks(self, z_CFhw: Tensor) -> Iterator[np.ndarray]:
        """Decode a ring of latents; yield the temporal * F frames (t, H, W, 3) uint8 of a loop as they are made.

        The ring is decoded twice in a row and the second round is kept, so that its first frame follows the last one.
        The loop starts in the middle of a latent frame: between two latent frames the video changes a little more,
        which would show where the loop closes.
        """
        geometry, latent_frames = self.backbone.geometry, z_CFhw.shape[1]
        first_round = geometry.num_frames(2 * latent_frames) - geometry.temporal * latent_frames
        start = first_round + geometry.temporal // 2  # the frames of the second round before it come last
        ending, passed = [], 0
        for frames in self.decode_chunks(torch.cat([z_CFhw, z_CFhw], 1)):
            ending.append(frames[max(0, first_round - passed) : max(0, start - passed)].copy())
            if len(kept := frames[max(0, start - passed) :]):
                yield kept
            passed += len(frames)
        yield np.concatenate(ending)

    def decode_ring(self, z_CFhw: Tensor) -> np.ndarray:
        """Decode a ring of latents to the frames (temporal * F, H, W, 3) uint8 of a loop."""
        return np.concatenate(list(self.decode_ring_chunks(z_CFhw)))

    def encoding_tile(self, width: int, height: int) -> int:
        """Return the side in pixels of the tiles that clips of a size were encoded in, 0 for no tiles."""
        return self._encoder.tile_of(width, height)

    def decoding_tile(self, z_CFhw: Tensor) -> int:
        """Return the side in pixels of the tiles that latents of this size are decoded in, 0 for no tiles."""
        return self._decoder.tile_of(z_CFhw)

    @cached_property
    def _encoder(self) -> VideoEncoder:
        return VideoEncoder(self)

    @cached_property
    def _decoder(self) -> VideoDecoder:
        return VideoDecoder(self)

    @cached_property
    def _tokenizers(self) -> dict[str, Any]:
        loaded = {}
        for part in self.backbone.family.tokenizers:
            with self.reading(part) as files:
                loaded[part] = self.backbone.load_tokenizer(part, files.paths[0])
        return loaded

    def _on_device(self, part: str) -> Any:
        if self.spec.offload:  # before the part is loaded, since its LoRAs are merged on the device
            encoders = self.backbone.family.text_encoders
            together = encoders if part in encoders else (part,)  # of each prompt, all of them are used
            for other, module in self._loaded.items():
                if other not in together:
                    module.to("cpu")
        if part not in self._loaded:
            with self.loading(part), self.reading(part) as files:
                loaded = load_part(self.backbone, files, self.dtype_of(part), self.device)
            self._loaded[part] = loaded
        return self._loaded[part].to(self.device)


def require_settings(spec: ModelSpec) -> None:
    """Check the settings of each part of a manifest's model that is on this machine. Nothing is loaded.

    Raises:
        WeightsError: one is missing, or out of the family's range, as those of another family are.
    """
    backbone = find_backbone(spec.backbone)
    for part in backbone.family.parts:
        if part in backbone.settings and is_here(spec, part):
            part_settings(backbone, locate_part(without_loras(spec), part))


def default_device() -> torch.device:
    """Return the first CUDA device if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """Return a device's name for records: a GPU's product name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def default_dtype(device: torch.device) -> torch.dtype:
    """Return bf16 for a GPU, as the base models were trained, and fp32 for a CPU, where bf16 is no faster."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def part_dtype(spec: ModelSpec, part: str, default: torch.dtype) -> torch.dtype:
    """Return the dtype in which a part of a manifest's model computes: its own, else the default of all parts."""
    own = spec.vae_dtype if part in find_family(spec.backbone).vaes else None
    dtype: torch.dtype = getattr(torch, own) if own else default
    return dtype
