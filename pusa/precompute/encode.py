"""Encode clips to posterior mean and log-variance, and captions to text features, as rows of shards."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pusa.data.encoding import DTYPES, pack
from pusa.data.schema import CUT, VERSION
from pusa.errors import Reason, Rejected
from pusa.weights.model import Model


def latent_statistics(model: Model) -> list[list[float]]:
    """Return the mean and the standard deviation of each latent channel, as lists."""
    return [value.flatten().tolist() for value in model.backbone.latent_statistics(model.vae)]


def latents_row(
    key: str, clip: Mapping[str, Any], mean: Tensor, logvar: Tensor, tile: int, dtype: str, encoding: str
) -> dict[str, Any]:
    """Return a row of "latents" from mean and log-variance (C, F, h, w).

    Raises:
        Rejected: values are not finite in `dtype`.
    """
    arrays = {"mean": mean, "logvar": logvar}
    for name, array in arrays.items():
        _require_finite(array, dtype, f"latents' {name}")
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
    """Return rows of "texts", in the order of `captions`; captions of similar length are encoded together.

    Of the empty prompt all features are kept, those after its valid tokens too: their number is the length to which a
    table pads the others with zeros, and of some families they are the text encoder's output for zeroed ids.

    Args:
        captions: the captions by key.
        model: the model whose text encoder is used.
        batch_size: the number of captions encoded at a time.
        dtype: the dtype in which features are stored.
        encoding: the layout of their bytes.

    Raises:
        Rejected: features of a caption are not finite in `dtype`.
    """
    null = [key for key, caption in captions.items() if not caption.strip()]
    rest = sorted(captions.keys() - set(null), key=lambda key: (len(captions[key]), key))
    batches = [null] if null else []
    batches += [rest[start : start + batch_size] for start in range(0, len(rest), batch_size)]
    rows = {}
    for keys in batches:
        text = model.encode_text([captions[key] for key in keys], padded=keys is null)
        pooled: Sequence[Tensor | None] = [None] * len(keys) if text.pooled is None else list(text.pooled)
        for key, features, mask, whole in zip(keys, text.features, text.mask, pooled, strict=True):
            kept = features if keys is null else features[mask]
            rows[key] = text_row(key, captions[key], kept, int(mask.sum()), dtype, encoding, whole)
    return [rows[key] for key in captions]


def text_row(
    key: str,
    caption: str,
    features: Tensor,
    tokens: int,
    dtype: str,
    encoding: str,
    pooled: Tensor | None = None,
) -> dict[str, Any]:
    """Return a row of "texts" from features (L, width), whose first `tokens` are valid, and pooled ones (width,).

    Raises:
        Rejected: values are not finite in `dtype`.
    """
    _require_finite(features, dtype, "text features")
    if pooled is not None:
        _require_finite(pooled, dtype, "pooled text features")
    return {
        "text_key": key,
        "caption": caption,
        "dtype": dtype,
        "encoding": encoding,
        "text_shape": list(features.shape),
        "tokens": tokens,
        "text": pack(features, dtype, encoding),
        "pooled": None if pooled is None else pack(pooled, dtype, encoding),
        "schema_version": VERSION,
    }


def _require_finite(array: Tensor, dtype: str, what: str) -> None:
    not_finite = int((~torch.isfinite(array.to(DTYPES[dtype]))).sum())
    if not_finite:
        detail = f"{not_finite} of {array.numel()} values of the {what} are not finite in {dtype}"
        raise Rejected(Reason.NOT_FINITE, detail)
