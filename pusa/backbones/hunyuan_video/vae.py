"""HunyuanVideo's VAE in the tiles of the original code, which are part of the function that its latents come from."""

import functools
from typing import Any

from diffusers import AutoencoderKLHunyuanVideo

TILE, TILE_STRIDE = 256, 192  # pixels
TILE_FRAMES, TILE_FRAMES_STRIDE = 64, 48


class PusaAutoencoderKLHunyuanVideo(AutoencoderKLHunyuanVideo):
    """diffusers' HunyuanVideo VAE with the original's tiles."""

    @functools.wraps(AutoencoderKLHunyuanVideo.__init__)  # type: ignore[misc]  # diffusers reads the signature
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.enable_tiling(TILE, TILE, TILE_FRAMES, TILE_STRIDE, TILE_STRIDE, TILE_FRAMES_STRIDE)
