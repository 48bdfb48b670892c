"""Mochi's VAE that decodes as genmo's does, and works on chunks of a clip to save memory.

The VAE is causal in time, each frame has its own group norms, and attention (in the encoder only) joins the frames of
one pixel. So each convolution can run on a few frames and the last frames of the chunk before, and attention on a few
pixels at a time. Decoding then needs memory for one chunk; encoding also for one or two activations of the whole clip.

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

Step = Callable[[Tensor, Any], tuple[Tensor, Any]]  # (chunk, cache of the chunk before) -> (result, cache)

STREAMED = "streamed"  # beside diffusers' own values of `pad_mode`, "constant" and "replicate"
MAX_SEQUENCES = 2**15  # as in diffusers: CUDA limits the number of sequences in one attention call


class PusaAutoencoderKLMochi(AutoencoderKLMochi):
    """diffusers' Mochi VAE that decodes the first frames of a clip as genmo's does, and can work in chunks.

    Constructor, configuration, parameter names and files are the base class's. `latent_frames_at_once` does not change
    results. Chunks are for inference.
    """

    @functools.wraps(AutoencoderKLMochi.__init__)  # type: ignore[misc]  # diffusers reads the signature to rebuild a saved model
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, CogVideoXCausalConv3d):
                module.__class__ = StreamedCausalConv3d
                # diffusers' class splits inputs above 2 GiB in time, with stride at wrong frames (480p, 163 frames).
                module.conv.__class__ = nn.Conv3d
            elif isinstance(module, MochiUpBlock3D):
                module.__class__ = CausalUpBlock3D
        self.encoder.__class__ = StreamedEncoder3D
        self.encoder.frames_each = self.temporal_compression_ratio
        self.drop_last_temporal_frames = False  # the up blocks do this now
        self.latent_frames_at_once = None

    @property
    def latent_frames_at_once(self) -> int | None:
        """Return how many latent frames are encoded or decoded at a time; None is all, as in the base class."""
        return self._latent_frames_at_once

    @latent_frames_at_once.setter
    def latent_frames_at_once(self, count: int | None) -> None:
        if count is not None and count < 1:
            raise ValueError(f"latent_frames_at_once is {count}; expected None, or 1 or more")
        self._latent_frames_at_once = self.encoder.latent_frames_at_once = count
        for module in self.modules():
            if isinstance(module, StreamedCausalConv3d):
                module.pad_mode = "replicate" if count is None else STREAMED

    def _decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Decode latents (B, C, F, h, w) to pixels (B, 3, T, H, W)."""
        if self.latent_frames_at_once is None or self.use_tiling:
            return super()._decode(z, return_dict)
        sample = torch.cat(list(self.decode_chunks(z, self.latent_frames_at_once)), 2)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def decode_chunks(self, z_BCFhw: Tensor, latent_frames: int, tile: int = 0) -> Iterator[Tensor]:
        """Decode `latent_frames` at a time; yield their pixels (B, 3, t, H, W) as they are made.

        With `tile`, in tiles of this many pixels a side that overlap by a quarter, as diffusers does, but each tile
        continues from its own frames of the chunk before.
        """
        self.latent_frames_at_once = latent_frames
        height, width = z_BCFhw.shape[-2:]
        side = tile // self.spatial_compression_ratio or max(height, width)
        stride = side * 3 // 4 if tile else side
        places = [[(top, left) for left in range(0, width, stride)] for top in range(0, height, stride)]
        caches: dict[tuple[int, int], Any] = {}
        for chunk in _split(z_BCFhw, latent_frames, 1):
            rows: list[list[Tensor]] = []
            for row in places:
                rows.append([])
                for top, left in row:
                    part = chunk[..., top : top + side, left : left + side]
                    pixels, caches[top, left] = self.decoder(part, caches.get((top, left)))
                    rows[-1].append(pixels)
            yield rows[0][0] if len(places) == len(places[0]) == 1 else self._blend(rows, side, stride)
            del rows, pixels

    def _blend(self, rows: list[list[Tensor]], side: int, stride: int) -> Tensor:
        """Return the frames of decoded tiles; neighbours fade into each other. `side` and `stride` are of latents."""
        kept = stride * self.spatial_compression_ratio
        overlap = side * self.spatial_compression_ratio - kept
        blended = []
        for i, row in enumerate(rows):
            for j, tile in enumerate(row):
                above = self.blend_v(rows[i - 1][j], tile, overlap) if i else tile
                row[j] = self.blend_h(row[j - 1], above, overlap) if j else above
            blended.append(torch.cat([tile[..., :kept, :kept] for tile in row], 4))
        return torch.cat(blended, 3)


class StreamedEncoder3D(MochiEncoder3D):
    """diffusers' encoder that can work in chunks, and takes uint8 frames, which become floats chunk by chunk."""

    latent_frames_at_once: int | None
    frames_each: int  # that become one latent frame

    def forward(self, hidden_states: Tensor, conv_cache: None = None) -> tuple[Tensor, dict[str, Any]]:
        """Encode pixels (B, 3, T, H, W) of a whole clip to mean and log-variance (B, 2 * C, F, h, w)."""
        if self.latent_frames_at_once is None:
            return super().forward(self._to_floats(hidden_states))
        chunks = _split(hidden_states, self.latent_frames_at_once, self.frames_each)
        steps: list[Step] = [self._enter]
        for layer, norm, attention in _layers(self):
            steps.append(layer)
            if attention is not None:
                _stream(steps, chunks)
                _attend(norm, attention, chunks)
                steps = []
        _stream([*steps, self._leave], chunks)
        return torch.cat(chunks, 2), {}

    def _to_floats(self, x_BCTHW: Tensor) -> Tensor:
        """Return the pixels in [-1, 1]. On a GPU the division would round in another way, so it comes first."""
        x_BCTHW = x_BCTHW if x_BCTHW.is_floating_point() else x_BCTHW.float() / 127.5 - 1
        return x_BCTHW.to(self.proj_in.weight.device, self.proj_in.weight.dtype)

    def _enter(self, x_BCTHW: Tensor, cache: None) -> tuple[Tensor, None]:
        features = self.fourier_features(self._to_floats(x_BCTHW))
        return self.proj_in(features.movedim(1, -1)).movedim(-1, 1), None

    def _leave(self, x_BCTHW: Tensor, cache: None) -> tuple[Tensor, None]:
        x_BCTHW = self.nonlinearity(self.norm_out(x_BCTHW))
        return self.proj_out(x_BCTHW.movedim(1, -1)).movedim(-1, 1), None


class StreamedCausalConv3d(CogVideoXCausalConv3d):
    """diffusers' convolution with a third `pad_mode`: edge padding in space, the frames before the chunk in time."""

    def forward(self, inputs: Tensor, conv_cache: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Convolve a chunk (B, C, T, H, W) with the frames before it, None at the start of a clip.

        Returns (B, C', T', H', W') and the frames that the next chunk needs. T must be a multiple of the stride in
        time, plus 1 at the start of a clip.
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
    """diffusers' block that drops the repetitions of a clip's first frame at once, as genmo's does.

    diffusers drops them from the finished video, after all later convolutions have used them as the past. With genmo's
    weights that gives other first frames, which are the frames given in image-to-video.
    """

    def forward(self, hidden_states: Tensor, conv_cache: dict[str, Any] | None = None) -> tuple[Tensor, dict[str, Any]]:
        """Upsample a chunk (B, C, T, H, W); return (B, C', T', H', W') and the cache for the next chunk."""
        x_BCTHW, cache = super().forward(hidden_states, conv_cache)
        return x_BCTHW[:, :, self.temporal_expansion - 1 :] if conv_cache is None else x_BCTHW, cache


def _split(x_BCTHW: Tensor, latent_frames: int, frames_each: int) -> list[Tensor]:
    """Split into chunks of `latent_frames`; the first latent frame is one frame, each other is `frames_each`."""
    seen = x_BCTHW.shape[2] - (x_BCTHW.shape[2] - 1) % frames_each  # the rest does not reach a latent frame
    cuts = range(1 + (latent_frames - 1) * frames_each, seen, latent_frames * frames_each)
    return list(x_BCTHW[:, :, :seen].tensor_split(list(cuts), dim=2))


def _layers(encoder: MochiEncoder3D) -> Iterator[tuple[Step, Any, Any]]:
    """Yield the encoder's convolutions and resnets in order, each with the norm and attention after it, or None."""
    for block in (encoder.block_in, *encoder.down_blocks, encoder.block_out):
        if isinstance(block, MochiDownBlock3D):
            yield block.conv_in, None, None
        yield from zip(block.resnets, block.norms, block.attentions, strict=True)


def _stream(steps: list[Step], chunks: list[Tensor]) -> None:
    """Replace each chunk (B, C, T, H, W) of a clip by the result of the steps."""
    caches: list[Any] = [None] * len(steps)
    for i in range(len(chunks)):
        for j, step in enumerate(steps):
            chunks[i], caches[j] = step(chunks[i], caches[j])


def _attend(norm: nn.Module, attention: nn.Module, chunks: list[Tensor]) -> None:
    """Add attention over all frames to the chunks (B, C, T, H, W) of a clip, about one chunk's memory at a time."""
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
