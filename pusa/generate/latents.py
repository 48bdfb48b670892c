"""Keep the latents of a job in a file: written with a hash of everything in it, which is checked when they are read."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pusa.errors import MediaError, NotFiniteError, WeightsError
from pusa.weights.load import DTYPES, is_finite
from pusa.weights.tensors import StoredTensor, read_file
from pusa.weights.write import Loaded, save_tensors

LATENTS_SUFFIX = ".safetensors"  # of the latents that generation keeps beside each video
NAME = "latents"  # of the tensor in the file
HASH = "sha256"  # the key of the hash in the file's metadata; files of earlier versions have none


@dataclass(frozen=True)
class LatentsHeader:
    """What the header of a file states: the latents' shape, whether they are floats, and what they were made of."""

    shape: tuple[int, ...]
    floating: bool
    facts: Mapping[str, str]


def save_latents(path: Path, z_CFhw: Tensor, facts: Mapping[str, str]) -> None:
    """Write latents atomically, with facts about them and a hash of both."""
    save_tensors(path, {NAME: z_CFhw}, {**facts, HASH: _content_hash(z_CFhw, facts)})


def read_header(path: Path) -> LatentsHeader:
    """Return what a file states about its latents.

    Raises:
        MediaError: the file is missing, or holds none.
    """
    stored, facts = _open(path)
    return LatentsHeader(stored.shape, stored.dtype in DTYPES, facts)


def read_latents(path: Path) -> Tensor:
    """Return the latents in a file, as they were written.

    Raises:
        MediaError: the file is missing or damaged, or holds values that are not finite.
    """
    stored, facts = _open(path)
    if stored.dtype not in DTYPES:
        raise MediaError(f"{path} holds latents of dtype {stored.dtype}; expected one of {', '.join(DTYPES)}")
    try:
        content = stored.read()
    except WeightsError as error:
        raise MediaError(str(error)) from error
    latents = torch.frombuffer(content, dtype=DTYPES[stored.dtype]).reshape(stored.shape)
    written = facts.pop(HASH, None)
    if written is not None and written != _content_hash(latents, facts):
        raise MediaError(f"{path} is damaged: its content has another hash than when it was written")
    if not is_finite(latents):
        raise MediaError(f"{path} holds latents that are not finite")
    return latents


def _open(path: Path) -> tuple[StoredTensor, dict[str, str]]:
    try:
        tensors, facts = read_file(path)
    except WeightsError as error:  # which would end the run
        raise MediaError(f"{path} cannot be read as latents: {error}") from error
    if NAME not in tensors:
        raise MediaError(f"{path} holds no tensor {NAME!r}; expected latents that generation kept beside a video")
    return tensors[NAME], facts


def require_finite(values: Tensor, what: str) -> None:
    """Check that no value is NaN or infinite.

    Raises:
        NotFiniteError: names what they are, and how many are not finite.
    """
    if not is_finite(values):
        count = int((~values.isfinite()).sum())
        raise NotFiniteError(f"{what}: {count:,} of {values.numel():,} values are NaN or infinite")


def _content_hash(latents: Tensor, facts: Mapping[str, str]) -> str:
    stated = json.dumps([str(latents.dtype), latents.shape, dict(facts)], sort_keys=True)
    content = hashlib.sha256(stated.encode())
    for chunk in Loaded(latents).chunks():
        content.update(chunk)
    return content.hexdigest()
