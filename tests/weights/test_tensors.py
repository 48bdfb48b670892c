"""Tensors as bytes: reading, splitting and writing agree with torch and the safetensors library."""

import tracemalloc

import pytest
import torch
from safetensors.torch import load_file, save_file

from pusa.errors import WeightsError
from pusa.weights.tensors import concatenate, is_written, read_file, read_sharded, write_file


@pytest.fixture
def file(tmp_path):
    tensors = {
        "b.weight": torch.randn(6, 4).bfloat16(),
        "a.weight": torch.randn(3, 2, 2),
        "c": torch.randn(8).half(),
        "d": torch.arange(5),
        "é": torch.randn(()),
    }
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    return tmp_path / "a.safetensors"


def test_a_file_read_and_written_again_has_the_librarys_bytes(file, tmp_path):
    tensors, metadata = read_file(file)
    write_file(tmp_path / "b.safetensors", tensors, metadata)
    assert (tmp_path / "b.safetensors").read_bytes() == file.read_bytes()


def test_split_and_concatenate_agree_with_torch(file, tmp_path):
    tensors, _ = read_file(file)
    b = tensors["b.weight"]
    count = b.shape[0]
    two, three = b.split([count // 2] * 2), b.split([count // 3] * 3)
    halves = {"first": two[0], "third": three[2], "swapped": concatenate(reversed(two))}
    write_file(tmp_path / "b.safetensors", halves, {})
    whole, written = load_file(file)["b.weight"], load_file(tmp_path / "b.safetensors")
    assert torch.equal(written["first"], whole[:3]) and torch.equal(written["third"], whole[4:])
    assert torch.equal(written["swapped"], torch.cat([whole[3:], whole[:3]]))
    with pytest.raises(WeightsError, match="cannot be concatenated"):
        concatenate([tensors["a.weight"], b])


def test_is_written_compares_every_byte(file, tmp_path):
    tensors, metadata = read_file(file)
    path = tmp_path / "b.safetensors"
    assert not is_written(path, tensors, metadata)
    write_file(path, tensors, metadata)
    assert is_written(path, tensors, metadata) and not is_written(path, tensors, {})
    for place in (20, path.stat().st_size - 1):
        damaged = bytearray(file.read_bytes())
        damaged[place] ^= 1
        path.write_bytes(damaged)
        assert not is_written(path, tensors, metadata)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:4],
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data[:8] + b"[" + data[9:],
        lambda data: data.replace(b'"BF16"', b'"XX16"'),
        lambda data: data.replace(b'"shape":[6,4]', b'"shape":[6,5]'),
        lambda data: data.replace(b'"shape":[6,4]', b'"shape":[6.,4]'),
        lambda data: data.replace(b'"shape":[6,4]', b'"shape":[-6,-4]'),
        lambda data: data.replace(b'{"format":"pt"}', b"[1,2,3,4,5,678]"),
        lambda data: data.replace(b'"format":"pt"', b'"format":12345'[:13]),
        lambda data: (200_000).to_bytes(8, "little") + b"[" * 200_000,
        lambda data: b"\x80\x02}q\x00." + data,  # the start of a pickle
    ],
)
def test_an_incomplete_or_foreign_file_is_refused_by_name(file, damage):
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(WeightsError, match=r"a\.safetensors is"):
        read_file(file)


def test_shards_and_their_index_must_agree(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "m-00001-of-00002.safetensors")
    save_file({"b": torch.ones(2)}, tmp_path / "m-00002-of-00002.safetensors")
    with pytest.raises(WeightsError, match="no index"):
        read_sharded(tmp_path)
    names = '{"weight_map": {"a": "m-00001-of-00002.safetensors", "%s": "m-00002-of-00002.safetensors"}}'
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(names % "c")
    with pytest.raises(WeightsError, match="disagree on 2 tensors, such as 'b'"):
        read_sharded(tmp_path)
    for text in ('{"weight_map": []}', '{"weight_map": {"a": 5}}', "[]", "{"):
        index.write_text(text)
        with pytest.raises(WeightsError, match="is not an index of shards"):
            read_sharded(tmp_path)
    index.write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    with pytest.raises(WeightsError, match="is not a file beside it"):
        read_sharded(tmp_path)
    index.write_text(names % "b")
    assert set(read_sharded(tmp_path)[0]) == {"a", "b"}
    (tmp_path / "m-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match="missing: 'm-00002-of-00002"):
        read_sharded(tmp_path)


def test_a_large_file_is_written_through_a_small_buffer(tmp_path):
    save_file({str(i): torch.zeros(4_000_000) for i in range(8)}, tmp_path / "big.safetensors")  # 128 MB
    tensors, _ = read_file(tmp_path / "big.safetensors")
    tracemalloc.start()
    write_file(
        tmp_path / "copy.safetensors",
        {name: concatenate(reversed(t.split([t.shape[0] // 2] * 2))) for name, t in tensors.items()},
        {},
    )
    assert tracemalloc.get_traced_memory()[1] < 40e6
    tracemalloc.stop()
