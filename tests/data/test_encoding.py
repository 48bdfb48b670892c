"""Tensors as bytes and back."""

import pytest
import torch

from pusa.data.encoding import DTYPES, ENCODINGS, pack, smallest, unpack


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("encoding", ENCODINGS.values())
def test_every_bit_comes_back(dtype, encoding):
    tensor = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    data = pack(tensor.transpose(0, 2), dtype, encoding)  # whatever its strides
    assert torch.equal(unpack(memoryview(bytearray(data)), dtype, (7, 5, 3), encoding), tensor.transpose(0, 2))


def test_raw_is_not_copied():
    memory = bytearray(pack(torch.arange(6.0), "float32", "raw"))
    tensor = unpack(memoryview(memory), "float32", (2, 3), "raw")
    memory[:4] = pack(torch.tensor([9.0]), "float32", "raw")
    assert tensor[0, 0] == 9


def test_planes_put_what_repeats_together():
    data = pack(torch.tensor([1.0, 1.0, 1.0]), "float32", "planes")
    assert data == bytes([0] * 6 + [0x80] * 3 + [0x3F] * 3)


@pytest.mark.parametrize(("value", "dtype"), [(0.5, "bfloat16"), (1 + 2**-9, "float16"), (1 + 2**-20, "float32")])
def test_the_smallest_dtype_keeps_every_bit(value, dtype):
    assert smallest(torch.tensor([1.0, value])) == dtype
