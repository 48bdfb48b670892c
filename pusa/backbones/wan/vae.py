"""Wan's VAE in longer chunks of a clip than diffusers' one latent frame: the same function, faster.

The VAE is exactly causal: each convolution sees the frames of its chunk and the last frames of the chunk before, which
diffusers' classes take from a list of caches. Here each stream, and each tile of one, has a list of its own.

Shapes: B batch, C channels, T frames, F latent frames; H, W height and width; h, w latent.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify, unpatchify
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor

from pusa.backbones.family import Geometry

Caches = list[Any]  # what each convolution of the encoder or decoder keeps of the chunk before; None at the start
Work = Callable[[Tensor, Caches, bool], Tensor]  # (part of a chunk, its caches, whether it is the first) -> result


class PusaAutoencoderKLWan(AutoencoderKLWan):
    """diffusers' Wan VAE that works on any number of latent frames at a time.

    Constructor, configuration, parameter names and files are the base class's, and so is what `encode` and `decode`
    compute, but for two things: they refuse a clip that the base class would cut, and take uint8 frames.
    """

    latent_frames_at_once = 1  # of `encode` and `decode`; it does not change results

    @property
    def geometry(self) -> Geometry:
        """Return how this VAE's pixels become latents."""
        spatial, temporal = self.config.scale_factor_spatial, self.config.scale_factor_temporal
        return Geometry(spatial=spatial, temporal=temporal, patch=1, channels=self.config.z_dim)

    def encode_chunks(self, x_BCTHW: Tensor, latent_frames: int, tile: int = 0) -> Iterator[Tensor]:
        """Encode the first frame, then `latent_frames` at a time; yield their means and log-variances as they are made.

        Args:
            x_BCTHW: frames in uint8, which become floats chunk by chunk, or floats in [-1, 1].
            latent_frames: the length of a chunk; it does not change the result.
            tile: side in pixels of tiles, which overlap by a quarter; 0 for no tiles.

        Yields:
            (B, 2 * C, f, h, w) for each chunk of f latent frames.

        Raises:
            ConditionError: the VAE would drop frames or pixels; names the nearest legal numbers.
        """
        frames, height, width = x_BCTHW.shape[2:]
        self.geometry.check(width, height, frames)
        chunks = _split(x_BCTHW, latent_frames, self.geometry.temporal)
        return self._stream(chunks, self._encode_part, "encoder", tile, self.geometry.spatial, 1)

    def decode_chunks(self, z_BCFhw: Tensor, latent_frames: int, tile: int = 0) -> Iterator[Tensor]:
        """Decode the first latent frame, then `latent_frames` at a time; yield their pixels as they are made.

        Pixels are not clamped, so that gradients flow where they are outside [-1, 1].

        Args:
            z_BCFhw: the latents.
            latent_frames: the length of a chunk; it does not change the result.
            tile: side in pixels of tiles, which overlap by a quarter; 0 for no tiles.

        Yields:
            (B, 3, t, H, W) for each chunk.
        """
        chunks = _split(z_BCFhw, latent_frames, 1)
        return self._stream(chunks, self._decode_part, "decoder", tile, 1, self.geometry.spatial)

    def _encode(self, x: Tensor) -> Tensor:
        """Encode frames (B, 3, T, H, W) to mean and log-variance (B, 2 * C, F, h, w)."""
        if self.use_tiling:  # diffusers' own
            self.geometry.check(x.shape[4], x.shape[3], x.shape[2])
            return super()._encode(self._to_floats(x))
        return torch.cat(list(self.encode_chunks(x, self.latent_frames_at_once)), 2)

    def _decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Decode latents (B, C, F, h, w) to pixels (B, 3, T, H, W) in [-1, 1]."""
        if self.use_tiling:
            return super()._decode(z, return_dict)
        sample = torch.cat(list(self.decode_chunks(z, self.latent_frames_at_once)), 2).clamp(-1, 1)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def _to_floats(self, x_BCTHW: Tensor) -> Tensor:
        """Return the pixels in [-1, 1]. On a GPU the division would round in another way, so it comes first."""
        x_BCTHW = x_BCTHW if x_BCTHW.is_floating_point() else x_BCTHW.float() / 127.5 - 1
        return x_BCTHW.to(self.quant_conv.weight.device, self.quant_conv.weight.dtype)

    def _encode_part(self, x_BCTHW: Tensor, caches: Caches, first: bool) -> Tensor:
        x_BCTHW = patchify(self._to_floats(x_BCTHW), self.config.patch_size or 1)
        return self.quant_conv(self.encoder(x_BCTHW, feat_cache=caches, feat_idx=[0]))

    def _decode_part(self, z_BCFhw: Tensor, caches: Caches, first: bool) -> Tensor:
        x_BCTHW = self.decoder(self.post_quant_conv(z_BCFhw), feat_cache=caches, feat_idx=[0], first_chunk=first)
        return unpatchify(x_BCTHW, self.config.patch_size or 1)

    def _stream(
        self, chunks: list[Tensor], work: Work, coder: str, tile: int, before: int, after: int
    ) -> Iterator[Tensor]:
        """Work on the chunks of a clip in turn, each in tiles of `tile` pixels a side; yield the results.

        A latent pixel has `before` pixels a side in a chunk and `after` in a result. Each tile has its own caches.
        """
        height, width = (length // before for length in chunks[0].shape[-2:])
        side = max(2, tile // self.geometry.spatial) if tile else max(height, width)  # in latent pixels
        stride = side * 3 // 4 if tile else side
        places = [[(top, left) for left in range(0, width, stride)] for top in range(0, height, stride)]
        count = self._cached_conv_counts[coder]
        caches: dict[tuple[int, int], Caches] = {place: [None] * count for row in places for place in row}
        for number, chunk in enumerate(chunks):
            rows = [
                [
                    work(_cut(chunk, top * before, left * before, side * before), caches[top, left], number == 0)
                    for top, left in row
                ]
                for row in places
            ]
            yield rows[0][0] if len(places) == len(places[0]) == 1 else self._blend(rows, side * after, stride * after)
            del rows  # otherwise they would stay until the next chunk is done

    def _blend(self, rows: list[list[Tensor]], side: int, kept: int) -> Tensor:
        """Return the frames of tiles of `side` pixels, of which `kept` are not the next one's; neighbours fade."""
        blended = []
        for i, row in enumerate(rows):
            for j, tile in enumerate(row):
                above = self.blend_v(rows[i - 1][j], tile, side - kept) if i else tile
                row[j] = self.blend_h(row[j - 1], above, side - kept) if j else above
            blended.append(torch.cat([tile[..., :kept, :kept] for tile in row], 4))
        return torch.cat(blended, 3)


def _cut(x_BCTHW: Tensor, top: int, left: int, side: int) -> Tensor:
    return x_BCTHW[..., top : top + side, left : left + side]


def _split(x_BCTHW: Tensor, latent_frames: int, frames_each: int) -> list[Tensor]:
    """Split into the first frame, which is a latent frame, and chunks of `latent_frames` with `frames_each`.

    Raises:
        ValueError: a chunk would have no frame.
    """
    if latent_frames < 1:
        raise ValueError(f"latent_frames is {latent_frames}; expected 1 or more")
    return list(x_BCTHW.tensor_split(list(range(1, x_BCTHW.shape[2], latent_frames * frames_each)), dim=2))
