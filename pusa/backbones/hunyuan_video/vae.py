"""HunyuanVideo's VAE in the tiles of the original code, one after another, so that memory does not grow with a clip.

The VAE is not causal: its group norms span all frames and pixels that it is given together. So latents and pixels
depend on how a clip is cut, and the original's cuts are part of the function. In time a tile has 1 + 16 latent frames,
of which the first is only the past of the others (but at the start of a clip), and every tile starts 12 after the one
before. In space a tile has 256 pixels a side, and every tile starts 192 after the one before. Where tiles overlap, one
fades into the next.

Shapes: B batch, C channels, T frames, F latent frames; H, W height and width; h, w latent; N = F * h * w tokens.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLHunyuanVideo
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import HunyuanVideoMidBlock3D
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor

from pusa.backbones.family import Geometry
from pusa.backbones.hunyuan_video import FAMILY

Work = Callable[[Tensor], Tensor]  # a tile -> its latents or pixels
Scale = tuple[int, int]  # frames of a latent frame, pixels a side of a latent pixel


class PusaAutoencoderKLHunyuanVideo(AutoencoderKLHunyuanVideo):
    """diffusers' HunyuanVideo VAE with the original's tiles.

    Constructor, configuration, parameter names and files are the base class's, and so is what `encode` and `decode`
    compute after `enable_tiling` with the original's numbers, but for two things: they refuse a clip that the base
    class would cut, and take uint8 frames.
    """

    @functools.wraps(AutoencoderKLHunyuanVideo.__init__)  # type: ignore[misc]  # diffusers reads the signature
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        tiles = FAMILY.latent_settings
        side, stride = tiles["tile"], tiles["tile_stride"]
        self.enable_tiling(side, side, tiles["tile_frames"], stride, stride, tiles["tile_frames_stride"])
        for block in (self.encoder.mid_block, self.decoder.mid_block):
            block.__class__ = FramewiseMidBlock3D

    @property
    def geometry(self) -> Geometry:
        """Return how this VAE's pixels become latents."""
        config = self.config
        return Geometry(config.spatial_compression_ratio, config.temporal_compression_ratio, 1, config.latent_channels)

    def encode_chunks(self, x_BCTHW: Tensor, tile: int = 0) -> Iterator[Tensor]:
        """Encode one tile in time after another; yield their means and log-variances as they are made.

        Args:
            x_BCTHW: frames in uint8, which become floats tile by tile, or floats in [-1, 1].
            tile: side in pixels of tiles, which overlap by a quarter; 0 for the original's.

        Yields:
            (B, 2 * C, f, h, w) for each tile, without the overlaps.

        Raises:
            ConditionError: the VAE would drop frames or pixels; names the nearest legal numbers.
        """
        frames, height, width = x_BCTHW.shape[2:]
        self.geometry.check(width, height, frames)
        return self._stream(x_BCTHW, self._encode_tile, (self.geometry.temporal, self.geometry.spatial), (1, 1), tile)

    def decode_chunks(self, z_BCFhw: Tensor, latent_frames: int, tile: int = 0) -> Iterator[Tensor]:
        """Decode one tile in time after another; yield their pixels as they are made.

        Args:
            z_BCFhw: the latents.
            latent_frames: disregarded, since the length of a chunk is the original's.
            tile: side in pixels of tiles, which overlap by a quarter; 0 for the original's.

        Yields:
            (B, 3, t, H, W) for each tile, without the overlaps.
        """
        return self._stream(z_BCFhw, self._decode_tile, (1, 1), (self.geometry.temporal, self.geometry.spatial), tile)

    def _encode(self, x: Tensor) -> Tensor:
        """Encode frames (B, 3, T, H, W) to mean and log-variance (B, 2 * C, F, h, w)."""
        return torch.cat(list(self.encode_chunks(x)), 2)

    def _decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Decode latents (B, C, F, h, w) to pixels (B, 3, T, H, W)."""
        sample = torch.cat(list(self.decode_chunks(z, z.shape[2])), 2)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def _encode_tile(self, x_BCTHW: Tensor) -> Tensor:
        # On a GPU the division would round in another way, so it comes first.
        x_BCTHW = x_BCTHW if x_BCTHW.is_floating_point() else x_BCTHW.float() / 127.5 - 1
        weight = self.quant_conv.weight
        return self.quant_conv(self.encoder(x_BCTHW.to(weight.device, weight.dtype)))

    def _decode_tile(self, z_BCFhw: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z_BCFhw))

    def _stream(self, x_BCTHW: Tensor, work: Work, before: Scale, after: Scale, tile: int) -> Iterator[Tensor]:
        """Work on the tiles in time in turn; yield the results without their overlaps, which fade.

        A latent frame and a latent pixel are `before` in size in what is given, and `after` in a result.
        """
        temporal = self.geometry.temporal
        length, stride = (
            frames // temporal for frames in (self.tile_sample_min_num_frames, self.tile_sample_stride_num_frames)
        )
        latent_frames = (x_BCTHW.shape[2] - 1) // before[0] + 1
        if latent_frames <= length:
            yield self._work_in_tiles(x_BCTHW, work, before[1], after[1], tile)
            return
        overlap, end = (length - stride) * after[0], None
        for start in range(0, latent_frames - 1, stride):
            part = x_BCTHW[:, :, start * before[0] : (start + length) * before[0] + 1]
            done = self._work_in_tiles(part, work, before[1], after[1], tile)
            if end is not None:
                done = _fade(end, done[:, :, 1:], overlap, 2)
            end = done[:, :, -overlap:].clone()  # a view would keep all of the tile
            yield done[:, :, : stride * after[0] + (start == 0)]
            del done  # otherwise it would stay until the next tile is done

    def _work_in_tiles(self, x_BCTHW: Tensor, work: Work, before: int, after: int, tile: int) -> Tensor:
        """Work on frames in tiles of some pixels a side where they are larger; a latent pixel is as in `_stream`."""
        sides = (self.tile_sample_min_height, self.tile_sample_min_width)
        strides = (self.tile_sample_stride_height, self.tile_sample_stride_width)
        high, wide, down, right = (pixels // self.geometry.spatial for pixels in (*sides, *strides))
        if tile:
            high = wide = max(2, tile // self.geometry.spatial)
            down = right = high * 3 // 4
        height, width = (side // before for side in x_BCTHW.shape[-2:])
        if height <= high and width <= wide:
            return work(x_BCTHW)
        strips: list[Tensor] = []
        above: list[Tensor] = []
        for top in range(0, height * before, down * before):
            rows = x_BCTHW[..., top : top + high * before, :]
            tiles = [work(rows[..., left : left + wide * before]) for left in range(0, width * before, right * before)]
            for j, done in enumerate(tiles):
                if above:
                    _fade(above[j], done, (high - down) * after, 3)
                if j:
                    _fade(tiles[j - 1], done, (wide - right) * after, 4)
            strips.append(torch.cat([done[..., : down * after, : right * after] for done in tiles], 4))
            above = [done[..., -(high - down) * after :, :].clone() for done in tiles]
        return torch.cat(strips, 3)


class FramewiseMidBlock3D(HunyuanVideoMidBlock3D):
    """diffusers' block, whose attention takes each latent frame by itself with the frames before it as keys.

    diffusers gives attention a mask of N x N values: 1.2 GB in fp32 for one of the original's tiles.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return (B, C, F, h, w) of the same shape."""
        hidden_states = self.resnets[0](hidden_states)
        for attention, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            if attention is not None:
                hidden_states = _attend(attention, hidden_states)
            hidden_states = resnet(hidden_states)
        return hidden_states


def _attend(attention: Any, x_BCFhw: Tensor) -> Tensor:
    """Add attention of each latent frame to itself and those before it; there is one head."""
    frame = x_BCFhw.shape[3] * x_BCFhw.shape[4]
    x_BNC = attention.group_norm(x_BCFhw.flatten(2)).transpose(1, 2)
    q_B1NC, k_B1NC, v_B1NC = (layer(x_BNC)[:, None] for layer in (attention.to_q, attention.to_k, attention.to_v))
    attended = [
        F.scaled_dot_product_attention(q_B1sC, k_B1NC[:, :, : (i + 1) * frame], v_B1NC[:, :, : (i + 1) * frame])
        for i, q_B1sC in enumerate(q_B1NC.split(frame, 2))
    ]
    x_BNC = attention.to_out[0](torch.cat(attended, 2)[:, 0])
    return x_BCFhw + x_BNC.transpose(1, 2).reshape(x_BCFhw.shape)


def _fade(first: Tensor, second: Tensor, overlap: int, dim: int) -> Tensor:
    """Fade the end of one tile into the start of the next, which is changed and returned: diffusers' `blend`, at once.

    Args:
        first: the tile that comes before.
        second: the tile after it, of the same size but for `dim`.
        overlap: how many frames or pixels fade, if both tiles have as many.
        dim: the dimension in which one follows the other.
    """
    overlap = min(first.shape[dim], second.shape[dim], overlap)
    weight = torch.arange(overlap, dtype=torch.float64, device=first.device) / max(1, overlap)
    weight = weight.view(-1, *[1] * (4 - dim))
    end, start = first.narrow(dim, first.shape[dim] - overlap, overlap), second.narrow(dim, 0, overlap)
    # Each product is rounded to the tiles' dtype, as diffusers' are.
    start.copy_((end * (1 - weight).float()).to(end.dtype) + (start * weight.float()).to(start.dtype))
    return second
