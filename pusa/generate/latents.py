"""Keep tensors in files: written with a hash of everything in the file, which is checked when they are read.

The latents of a job lie alone in a file, with the name `latents`. Encodings and saved states hold tensors of other
names.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pusa.errors import MediaError, NotFiniteError, WeightsError
from pusa.weights.load import DTYPES, is_finite
from pusa.weights.tensors import StoredTensor, Tensors, read_file
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
    save_verified(path, {NAME: z_CFhw}, facts)


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
    latents = _read_all(path, {NAME: stored}, facts)[NAME]
    if not is_finite(latents):
        raise MediaError(f"{path} holds latents that are not finite")
    return latents


def save_verified(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    """Write tensors of floats atomically, with facts about them and a hash of both."""
    save_tensors(path, tensors, {**facts, HASH: _content_hash(tensors, facts)})


def read_verified(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors that `save_verified` wrote, and the facts.

    Raises:
        MediaError: the file is missing, damaged, or of another kind.
    """
    stored, facts = _read_header(path)
    if HASH not in facts or any(tensor.dtype not in DTYPES for tensor in stored.values()):
        raise MediaError(f"{path} is no file of Pusa: it has no hash of its content, or tensors that are not floats")
    return _read_all(path, stored, facts), facts


def read_facts(path: Path) -> dict[str, str]:
    """Return the facts that `save_verified` wrote, without reading and checking the tensors.

    Raises:
        MediaError: the file is missing, torn, or of another kind.
    """
    return _read_header(path)[1]


def _open(path: Path) -> tuple[StoredTensor, dict[str, str]]:
    tensors, facts = _read_header(path)
    if NAME not in tensors:
        raise MediaError(f"{path} holds no tensor {NAME!r}; expected latents that generation kept beside a video")
    return tensors[NAME], facts


def _read_header(path: Path) -> tuple[Tensors, dict[str, str]]:
    try:
        return read_file(path)
    except WeightsError as error:  # which would end the run
        raise MediaError(f"{path} cannot be read as latents: {error}") from error


def _read_all(path: Path, stored: Tensors, facts: dict[str, str]) -> dict[str, Tensor]:
    """Read the contents of tensors of floats, and check them against the hash, which is removed from the facts."""
    try:
        contents = {name: tensor.read() for name, tensor in stored.items()}
    except (WeightsError, OSError) as error:
        raise MediaError(str(error)) from error
    tensors = {
        name: (torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)).reshape(shape)
        for name, content in contents.items()
        for dtype, shape in [(DTYPES[stored[name].dtype], stored[name].shape)]
    }
    written = facts.pop(HASH, None)
    if written is not None and written != _content_hash(tensors, facts):
        raise MediaError(f"{path} is damaged: its content has another hash than when it was written")
    return tensors


def require_finite(values: Tensor, what: str) -> None:
    """Check that no value is NaN or infinite.

    Raises:
        NotFiniteError: names what they are, and how many are not finite.
    """
    if not is_finite(values):
        count = int((~values.isfinite()).sum())
        raise NotFiniteError(f"{what}: {count:,} of {values.numel():,} values are NaN or infinite")


def _content_hash(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> str:
    content = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        named = [name] if name != NAME else []  # so that the hashes in older files, which hold latents, stay right
        content.update(json.dumps([str(tensor.dtype), tensor.shape, dict(facts), *named], sort_keys=True).encode())
        for chunk in Loaded(tensor).chunks():
            content.update(chunk)
    return content.hexdigest()
