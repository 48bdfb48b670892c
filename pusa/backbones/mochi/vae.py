"""Mochi's VAE, decoding as genmo's does, and in pieces: a few latent frames, or pixels through all frames, at a time.

It is causal in time, each frame has its own group norms, and its attention (encoder only) joins the frames of one
pixel. So each convolution can run on a few frames and the last ones it saw, and attention on a few pixels. Decoding
then needs memory for one chunk; encoding also for one or two activations of the whole clip.

Shapes: B batch, C channels, T frames, F latent frames; H, W height and width; h, w latent; P = H * W pixels.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLMochi
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXCausalConv3d
from diffusers.models.autoencoders.autoencoder_kl_mochi import MochiDownBlock3D, MochiEncoder3D, MochiUpBlock3D
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor, nn

Step = Callable[[Tensor, Any], tuple[Tensor, Any]]  # a chunk and what the one before left behind -> the same two

STREAMED = "streamed"  # beside diffusers' own values of `pad_mode`, "constant" and "replicate"
MAX_SEQUENCES = 2**15  # as in diffusers: CUDA refuses attention over very many sequences at once


class PusaAutoencoderKLMochi(AutoencoderKLMochi):
    """diffusers' Mochi VAE that decodes a clip's first frames as genmo's, and can work on `latent_frames_at_once`.

    Same constructor, configuration, parameter names and files as the base class; the same results with any number at
    once. Pieces are for inference.
    """

    @functools.wraps(AutoencoderKLMochi.__init__)  # type: ignore[misc]  # diffusers reads the signature to rebuild a saved model
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, CogVideoXCausalConv3d):
                module.__class__ = StreamedCausalConv3d
                # diffusers' own cuts inputs above 2 GiB in time; where it strides, at wrong frames (480p, 163 frames).
                module.conv.__class__ = nn.Conv3d
            elif isinstance(module, MochiUpBlock3D):
                module.__class__ = CausalUpBlock3D
        self.drop_last_temporal_frames = False  # its way of doing what the up blocks now do
        self.latent_frames_at_once = None

    @property
    def latent_frames_at_once(self) -> int | None:
        """How many latent frames to encode or decode at a time, 1 or more; None for all, as the base class does."""
        return self._latent_frames_at_once

    @latent_frames_at_once.setter
    def latent_frames_at_once(self, count: int | None) -> None:
        if count is not None and count < 1:
            raise ValueError(f"latent_frames_at_once is {count}; allowed are None and 1 or more")
        self._latent_frames_at_once = count
        for module in self.modules():
            if isinstance(module, StreamedCausalConv3d):
                module.pad_mode = "replicate" if count is None else STREAMED

    def _encode(self, x: Tensor) -> Tensor:
        """Pixels (B, 3, T, H, W) -> mean and log-variance (B, 2 * C, F, h, w)."""
        if self.latent_frames_at_once is None or self.use_tiling:
            return super()._encode(x)
        chunks = _split(x, self.latent_frames_at_once, self.temporal_compression_ratio)
        steps: list[Step] = [self._enter]
        for layer, norm, attention in _layers(self.encoder):
            steps.append(layer)
            if attention is not None:
                _stream(steps, chunks)
                _attend(norm, attention, chunks)
                steps = []
        _stream([*steps, self._leave], chunks)
        return torch.cat(chunks, 2)

    def _decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Latents (B, C, F, h, w) -> pixels (B, 3, T, H, W)."""
        if self.latent_frames_at_once is None or self.use_tiling:
            return super()._decode(z, return_dict)
        chunks = _split(z, self.latent_frames_at_once, 1)
        _stream([self.decoder], chunks)
        sample = torch.cat(chunks, 2)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def _enter(self, x_BCTHW: Tensor, cache: None) -> tuple[Tensor, None]:
        features = self.encoder.fourier_features(x_BCTHW)
        return self.encoder.proj_in(features.movedim(1, -1)).movedim(-1, 1), None

    def _leave(self, x_BCTHW: Tensor, cache: None) -> tuple[Tensor, None]:
        x_BCTHW = self.encoder.nonlinearity(self.encoder.norm_out(x_BCTHW))
        return self.encoder.proj_out(x_BCTHW.movedim(1, -1)).movedim(-1, 1), None


class StreamedCausalConv3d(CogVideoXCausalConv3d):
    """diffusers' convolution with a third `pad_mode`: space by its edge, time by the frames before the chunk."""

    def forward(self, inputs: Tensor, conv_cache: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(B, C, T, H, W) and its past, None at a clip's start -> (B, C', T', H', W') and the past of the next chunk.

        T must be a multiple of the stride in time, plus 1 at a clip's start.
        """
        if self.pad_mode != STREAMED:
            return super().forward(inputs, conv_cache)
        past = self.time_kernel_size - self.conv.stride[0]  # 0 where windows do not overlap
        padded = F.pad(inputs, self.time_causal_padding, mode="replicate")
        if conv_cache is not None:
            padded = padded[:, :, self.time_pad - past :]
            padded[:, :, :past] = conv_cache
        return self.conv(padded), padded[:, :, padded.shape[2] - past :].clone()  # a view would keep `padded` alive


class CausalUpBlock3D(MochiUpBlock3D):
    """diffusers' block, dropping the repetitions of a clip's first frame at once, as genmo's does.

    diffusers drops them from the finished video, after all later convolutions took them for the past. With genmo's
    weights that is another function for the first frames, the very ones that are given in image-to-video.
    """

    def forward(self, hidden_states: Tensor, conv_cache: dict[str, Any] | None = None) -> tuple[Tensor, dict[str, Any]]:
        """(B, C, T, H, W) and its past, None at a clip's start -> (B, C', T', H', W') and the next chunk's past."""
        x_BCTHW, cache = super().forward(hidden_states, conv_cache)
        return x_BCTHW[:, :, self.temporal_expansion - 1 :] if conv_cache is None else x_BCTHW, cache


def _split(x_BCTHW: Tensor, latent_frames: int, frames_each: int) -> list[Tensor]:
    """Cut every `latent_frames`, of which a clip's first is one frame and the others are `frames_each`."""
    seen = x_BCTHW.shape[2] - (x_BCTHW.shape[2] - 1) % frames_each  # the rest reaches no latent frame
    cuts = range(1 + (latent_frames - 1) * frames_each, seen, latent_frames * frames_each)
    return list(x_BCTHW[:, :, :seen].tensor_split(list(cuts), dim=2))


def _layers(encoder: MochiEncoder3D) -> Iterator[tuple[Step, Any, Any]]:
    """The encoder's convolutions and resnets in order, each with the norm and attention after it, or None, None."""
    for block in (encoder.block_in, *encoder.down_blocks, encoder.block_out):
        if isinstance(block, MochiDownBlock3D):
            yield block.conv_in, None, None
        yield from zip(block.resnets, block.norms, block.attentions, strict=True)


def _stream(steps: list[Step], chunks: list[Tensor]) -> None:
    """Replace each chunk (B, C, T, H, W) of a clip by what the steps make of it."""
    caches: list[Any] = [None] * len(steps)
    for i in range(len(chunks)):
        for j, step in enumerate(steps):
            chunks[i], caches[j] = step(chunks[i], caches[j])


def _attend(norm: nn.Module, attention: nn.Module, chunks: list[Tensor]) -> None:
    """Add to a clip's chunks (B, C, T, H, W) their attention through all frames, about a chunk's worth at a time."""
    batch, channels, _, height, width = chunks[0].shape
    lengths = [chunk.shape[2] for chunk in chunks]
    x_BCTP = chunks[0].new_empty(batch, channels, sum(lengths), height * width)
    for part, chunk in zip(x_BCTP.split(lengths, 2), chunks, strict=True):
        part.copy_(norm(chunk).flatten(3))
    pixels = max(1, min(height * width // len(chunks), MAX_SEQUENCES // batch))
    for part in x_BCTP.split(pixels, 3):
        attended = attention(part.permute(0, 3, 2, 1).flatten(0, 1).contiguous())
        part.copy_(attended.unflatten(0, (batch, -1)).permute(0, 3, 2, 1))
    for part, chunk in zip(x_BCTP.split(lengths, 2), chunks, strict=True):
        chunk += part.unflatten(3, (height, width))
