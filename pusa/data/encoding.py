"""Tensors as the bytes that a latents table stores, and back.

`raw` is the tensor as it is, so a mapped file can be used without a copy. `planes` lays the bytes of all values by
significance, the lowest first: signs and exponents, which repeat, lie together, and zstd makes a third less of them.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ENCODINGS = {"zstd": "planes", "none": "raw"}  # by a file's compression


def pack(tensor: Tensor, dtype: str, encoding: str) -> bytes:
    """A tensor's values as `dtype`, little-endian, in C order."""
    values = tensor.detach().cpu().to(DTYPES[dtype]).contiguous().flatten().view(torch.uint8).numpy()
    if encoding == "planes":
        values = values.reshape(-1, DTYPES[dtype].itemsize).T
    return values.tobytes()


def unpack(data: memoryview, dtype: str, shape: Sequence[int], encoding: str) -> Tensor:
    """The tensor again, of its own dtype; where the encoding is raw, on the very memory of `data`."""
    kind = DTYPES[dtype]
    values = np.frombuffer(data, np.uint8)
    if encoding == "planes":
        values = _interleaved(values.reshape(kind.itemsize, -1))
    return torch.from_numpy(values).view(kind).reshape(tuple(shape))


def smallest(tensor: Tensor) -> str:
    """The smallest dtype that keeps every bit of what a tensor says."""
    keeps: Callable[[str], bool] = lambda name: torch.equal(tensor.float(), tensor.to(DTYPES[name]).float())  # noqa: E731
    return next(name for name in DTYPES if keeps(name))


def _interleaved(planes: np.ndarray) -> np.ndarray:
    values = np.empty(planes.size, np.uint8)
    for place, plane in enumerate(planes):
        values[place :: len(planes)] = plane
    return values
