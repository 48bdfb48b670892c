"""Encode and decode with the VAE within the memory there is: less at a time, at last in tiles.

Tiles show slightly, since each has its own group norms. What worked for a size is kept for the next clips of it. The
VAE of some families always works in tiles, which are not counted as such here: of these only smaller ones are tried.
"""

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pusa.errors import NoMemoryError, NotFiniteError
from pusa.system.failures import is_out_of_memory
from pusa.system.text import first_line
from pusa.weights.load import is_finite

if TYPE_CHECKING:
    from pusa.weights.model import Model

log = logging.getLogger(__name__)
TILES = (256, 128, 64)  # sides in pixels that are tried, from large to small, once there is no memory without tiles


class VideoEncoder:
    """Encode clips: if memory runs out, fewer in a pass, then in tiles."""

    def __init__(self, model: "Model") -> None:
        self.model = model
        self._settings: dict[tuple[int, ...], tuple[int, int]] = {}  # shape of a clip -> clips in a pass, tile

    def encode(self, frames_BTHWC: np.ndarray) -> tuple[Tensor, Tensor, int]:
        """Encode uint8 frames to mean and log-variance, each (B, C, F, h, w); also return the tile, 0 for no tiles.

        Raises:
            NoMemoryError: there is not enough memory for one clip in the smallest tiles.
        """
        shape = frames_BTHWC.shape[1:]
        clips, tile = self._settings.get(shape, (len(frames_BTHWC), 0))
        while True:
            try:
                passes = np.split(frames_BTHWC, range(clips, len(frames_BTHWC), clips))
                pairs = [self.model.posterior(pass_BTHWC, tile) for pass_BTHWC in passes]
                means, logvars = zip(*pairs, strict=True)
                return torch.cat(means), torch.cat(logvars), tile
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = first_line(error)
            torch.cuda.empty_cache()  # the error, which held tensors, is gone here
            clips = min(clips, len(frames_BTHWC))
            if clips > 1:
                clips //= 2
            else:
                own = self.model.backbone.own_tile
                tile = _smaller_tile(tile or own, shape[1:3], f"a clip of {shape[0]} frames of", reason)
            self._settings[shape] = clips, tile
            log.warning(
                "out of memory at %s: trying %d clips at a time, tiles of %d pixels (0: none)", shape, clips, tile
            )

    def tile_of(self, width: int, height: int) -> int:
        """Return the side in pixels of the largest tiles that clips of a size were encoded in, 0 for no tiles."""
        return max((tile for shape, (_, tile) in self._settings.items() if shape[1:3] == (height, width)), default=0)


class VideoDecoder:
    """Decode videos piece by piece: if memory runs out, fewer latent frames at a time, then in tiles."""

    def __init__(self, model: "Model") -> None:
        self.model = model
        # Height and width of latents -> latent frames at a time, tile. The length of a video does not matter.
        self._settings: dict[tuple[int, ...], tuple[int, int]] = {}

    def tile_of(self, z_CFhw: Tensor) -> int:
        """Return the side in pixels of the tiles that latents of this size are decoded in, 0 for no tiles."""
        return self._settings.get(tuple(z_CFhw.shape[-2:]), (0, 0))[1]

    def decode(self, z_CFhw: Tensor) -> Iterator[np.ndarray]:
        """Decode latents in the VAE's own space; yield frames (t, H, W, 3) uint8, each frame once.

        After memory ran out, the latents are decoded again from the start, and only the other frames are yielded.

        Raises:
            NotFiniteError: the VAE gives values that are not finite, which would pass for black.
            NoMemoryError: there is not enough memory for one latent frame in the smallest tiles.
        """
        backbone, size = self.model.backbone, tuple(z_CFhw.shape[-2:])
        pixels = [side * backbone.geometry.spatial for side in size]
        yielded = 0
        while True:
            at_once, tile = self._settings.get(size) or (backbone.frames_at_once(z_CFhw[None]), 0)
            passed = 0
            try:
                for x_BCTHW in backbone.decode_video(self.model.vae, z_CFhw[None], at_once, tile):
                    frames_THWC = _to_uint8(x_BCTHW[0, :, max(0, yielded - passed) :])
                    passed += x_BCTHW.shape[2]
                    del x_BCTHW  # otherwise it would stay until the next chunk is decoded
                    if len(frames_THWC):
                        yielded = passed
                        yield frames_THWC
                return
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = first_line(error)
            torch.cuda.empty_cache()  # the error, which held tensors, is gone here
            if at_once > 1 and not backbone.own_tile:
                at_once //= 2
            else:
                what = f"{at_once} latent frames of" if at_once > 1 else "one latent frame of"
                tile = _smaller_tile(tile or backbone.own_tile, pixels, what, reason)
            self._settings[size] = at_once, tile
            log.warning(
                "out of memory while frames of %dx%d are decoded: trying %d latent frames at a time, tiles of %d "
                "pixels (0: none)", pixels[1], pixels[0], at_once, tile,
            )  # fmt: skip


def _to_uint8(x_CTHW: Tensor) -> np.ndarray:
    """Return pixels in [-1, 1] as frames (T, H, W, 3) on the CPU."""
    if not is_finite(x_CTHW):
        raise NotFiniteError("the VAE decodes the latents to values that are NaN or infinite")
    frames: np.ndarray = ((x_CTHW + 1) * 127.5).round().to(torch.uint8).movedim(0, -1).cpu().numpy()
    return frames


def _smaller_tile(tile: int, pixels: "tuple[int, ...] | list[int]", what: str, reason: str) -> int:
    """Return the next smaller tile for frames of `pixels` (height, width).

    Raises:
        NoMemoryError: there is none.
    """
    smaller = [size for size in TILES if size < min(tile or max(pixels), max(pixels))]
    if smaller:
        return smaller[0]
    tried = f"in tiles of {tile} pixels" if tile and tile < max(pixels) else "alone (it is too small for tiles)"
    raise NoMemoryError(f"{what} {pixels[1]}x{pixels[0]} does not fit in memory, not even {tried}: {reason}")
