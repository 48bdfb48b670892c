"""Convert tensors to the bytes that a latents table stores, and back.

`raw` keeps the bytes of a tensor in their order, so a mapped file can be used without a copy. `planes` groups the bytes
of all values by significance, the lowest first: signs and exponents repeat, so with them side by side zstd makes the
data about a third smaller.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ENCODINGS = {"zstd": "planes", "none": "raw"}  # by a file's compression


def pack(tensor: Tensor, dtype: str, encoding: str) -> bytes:
    """Return a tensor's values as `dtype`, little-endian, in C order, laid out as `encoding`."""
    values = tensor.detach().cpu().to(DTYPES[dtype]).contiguous().flatten().view(torch.uint8).numpy()
    if encoding == "planes":
        values = values.reshape(-1, DTYPES[dtype].itemsize).T
    return values.tobytes()


def unpack(data: memoryview, dtype: str, shape: Sequence[int], encoding: str) -> Tensor:
    """Return the tensor that was packed, in `dtype`. With encoding `raw` it shares the memory of `data`."""
    kind = DTYPES[dtype]
    values = np.frombuffer(data, np.uint8)
    if encoding == "planes":
        planes = values.reshape(kind.itemsize, -1)
        values = np.empty(planes.size, np.uint8)
        for significance, plane in enumerate(planes):
            values[significance :: len(planes)] = plane
    return torch.from_numpy(values).view(kind).reshape(tuple(shape))


def smallest(tensor: Tensor) -> str:
    """Return the first of `DTYPES` that keeps every value of a tensor of finite values."""
    return next(name for name, dtype in DTYPES.items() if torch.equal(tensor.float(), tensor.to(dtype).float()))
