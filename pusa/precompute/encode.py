"""Clips -> posterior mean and log-variance, captions -> text features, as rows of shards."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pusa.data.encoding import DTYPES, pack
from pusa.data.schema import CUT, VERSION
from pusa.errors import Reason, Rejected, StageError
from pusa.weights.model import Model

log = logging.getLogger(__name__)
TILES = (256, 128, 64)  # pixels; 0 before them is none


class VideoEncoder:
    """The VAE within the memory there is.

    Where that runs out, it takes fewer clips at a time, then tiles, which show a little (each has group norms of its
    own), and stays with what worked for clips of that shape.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self._settled: dict[tuple[int, ...], tuple[int, int]] = {}  # clip's shape -> clips at a time, tile

    def encode(self, frames_BTHWC: np.ndarray) -> tuple[Tensor, Tensor, int]:
        """uint8 frames -> mean and log-variance, each (B, C, F, h, w), and the tiles' size in pixels, 0 for none.

        Raises:
            StageError: one clip in the smallest tiles needs more memory than there is.
        """
        shape = frames_BTHWC.shape[1:]
        at_once, tile = self._settled.get(shape, (len(frames_BTHWC), 0))
        while True:
            try:
                parts = [
                    self._posterior(part, tile)
                    for part in np.split(frames_BTHWC, range(at_once, len(frames_BTHWC), at_once))
                ]
                mean, logvar = (torch.cat(some) for some in zip(*parts, strict=True))
                return mean, logvar, tile
            except torch.OutOfMemoryError as error:
                at_once, tile = self._settled[shape] = _smaller(min(at_once, len(frames_BTHWC)), tile, shape, error)
            torch.cuda.empty_cache()

    def _posterior(self, frames_BTHWC: np.ndarray, tile: int) -> tuple[Tensor, Tensor]:
        if tile:
            self.model.vae.enable_tiling(tile, tile, tile * 3 // 4, tile * 3 // 4)
        try:
            return self.model.posterior(frames_BTHWC)
        finally:
            if tile:
                self.model.vae.disable_tiling()


def _smaller(at_once: int, tile: int, shape: Sequence[int], error: Exception) -> tuple[int, int]:
    """What to try next."""
    tiles = [size for size in TILES if size < (tile or max(shape[1:3]))]
    if at_once == 1 and not tiles:
        raise StageError(
            f"a clip of {shape[0]} frames of {shape[2]}x{shape[1]} does not fit in memory: {error}"
        ) from error
    at_once, tile = (at_once // 2, tile) if at_once > 1 else (1, tiles[0])
    log.warning("out of memory at %s: trying %d clips at a time, tiles of %d pixels (0: none)", shape, at_once, tile)
    return at_once, tile


def latents_row(
    key: str, clip: Mapping[str, Any], mean: Tensor, logvar: Tensor, tile: int, dtype: str, encoding: str
) -> dict[str, Any]:
    """A row of "latents" from mean and log-variance (C, F, h, w).

    Raises:
        Rejected: they are not finite in `dtype`.
    """
    arrays = {"mean": mean, "logvar": logvar}
    for name, array in arrays.items():
        wrong = int((~torch.isfinite(array.to(DTYPES[dtype]))).sum())
        if wrong:
            raise Rejected(
                Reason.NOT_FINITE, f"{wrong} of {array.numel()} values of the latents' {name} are not finite in {dtype}"
            )
    return {
        "key": key,
        **{field.name: clip[field.name] for field in CUT},
        "dtype": dtype,
        "encoding": encoding,
        "latent_shape": list(mean.shape),
        "tile": tile,
        **{f"latent_{name}": pack(array, dtype, encoding) for name, array in arrays.items()},
        "schema_version": VERSION,
    }


def text_rows(
    captions: Mapping[str, str], model: Model, batch_size: int, dtype: str, encoding: str
) -> list[dict[str, Any]]:
    """Rows of "texts", one encoder pass for each batch of captions of about one length.

    Of the null prompt all features are kept, though none is valid: they are T5's of zeroed ids.

    Args:
        captions: by key.
        model: whose text encoder to use.
        batch_size: captions at once.
        dtype: what features are stored in.
        encoding: how they are laid out.
    """
    null = [key for key, caption in captions.items() if not caption.strip()]
    rest = sorted(captions.keys() - set(null), key=lambda key: (len(captions[key]), key))
    batches = [null] if null else []
    batches += [rest[start : start + batch_size] for start in range(0, len(rest), batch_size)]
    rows = {}
    for keys in batches:
        text = model.encode_text([captions[key] for key in keys], padded=keys is null)
        for key, features, mask in zip(keys, text.features, text.mask, strict=True):
            kept = features if keys is null else features[mask]
            rows[key] = text_row(key, captions[key], kept, int(mask.sum()), dtype, encoding)
    return [rows[key] for key in captions]


def text_row(key: str, caption: str, features: Tensor, tokens: int, dtype: str, encoding: str) -> dict[str, Any]:
    """A row of "texts" from features (L, width), of which `tokens` are valid."""
    return {
        "text_key": key,
        "caption": caption,
        "dtype": dtype,
        "encoding": encoding,
        "text_shape": list(features.shape),
        "tokens": tokens,
        "text": pack(features, dtype, encoding),
        "schema_version": VERSION,
    }
