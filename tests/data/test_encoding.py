"""Tensors become bytes and come back with every bit."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pusa.data.encoding import DTYPES, ENCODINGS, pack, smallest, unpack

shapes = st.lists(st.integers(1, 6), max_size=5).map(tuple)


@given(
    st.sampled_from(list(DTYPES)), st.sampled_from(sorted(set(ENCODINGS.values()))), shapes, st.integers(0, 2**32 - 1)
)
def test_every_bit_survives_in_every_dtype_shape_and_encoding(dtype, encoding, shape, seed):
    """All bit patterns are values, so NaN, infinity and negative zero occur too."""
    generator = torch.Generator().manual_seed(seed)
    count = math.prod(shape) * DTYPES[dtype].itemsize
    tensor = torch.randint(256, (count,), generator=generator, dtype=torch.uint8).view(DTYPES[dtype]).reshape(shape)
    data = pack(tensor, dtype, encoding)
    again = unpack(memoryview(bytearray(data)), dtype, shape, encoding)
    assert len(data) == count and again.dtype == tensor.dtype and again.shape == tensor.shape
    assert torch.equal(again.flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("encoding", ENCODINGS.values())
def test_strides_do_not_matter(dtype, encoding):
    tensor = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    data = pack(tensor.transpose(0, 2), dtype, encoding)
    assert torch.equal(unpack(memoryview(bytearray(data)), dtype, (7, 5, 3), encoding), tensor.transpose(0, 2))


def test_raw_data_is_not_copied():
    memory = bytearray(pack(torch.arange(6.0), "float32", "raw"))
    tensor = unpack(memoryview(memory), "float32", (2, 3), "raw")
    memory[:4] = pack(torch.tensor([9.0]), "float32", "raw")
    assert tensor[0, 0] == 9


def test_planes_group_bytes_by_significance():
    data = pack(torch.tensor([1.0, 1.0, 1.0]), "float32", "planes")
    assert data == bytes([0] * 6 + [0x80] * 3 + [0x3F] * 3)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=8))
def test_smallest_keeps_every_value_and_no_earlier_dtype_does(values):
    tensor = torch.tensor(values, dtype=torch.float32)
    dtype = smallest(tensor)
    keeps = [torch.equal(tensor.to(kind).float(), tensor) for kind in DTYPES.values()]
    assert keeps[list(DTYPES).index(dtype)] and not any(keeps[: list(DTYPES).index(dtype)])
    stored = unpack(memoryview(bytearray(pack(tensor, dtype, "planes"))), dtype, tensor.shape, "planes")
    assert torch.equal(stored.float(), tensor)


@given(st.sampled_from(["bfloat16", "float16"]), st.lists(st.integers(-(2**15), 2**15 - 1), max_size=8))
def test_smallest_keeps_every_bit_of_values_of_16_bits(dtype, patterns):
    values = torch.tensor(patterns, dtype=torch.int16).view(DTYPES[dtype]).float()
    values = values[values.isfinite()]
    stored = values.to(DTYPES[smallest(values)]).float()
    assert torch.equal(stored.view(torch.int32), values.view(torch.int32))


@pytest.mark.parametrize(("value", "dtype"), [(0.5, "bfloat16"), (1 + 2**-9, "float16"), (1 + 2**-20, "float32")])
def test_the_first_dtype_that_keeps_the_values_is_chosen(value, dtype):
    assert smallest(torch.tensor([1.0, value])) == dtype
