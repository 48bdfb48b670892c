"""Hashed shards are read at random, and damage to them is detected."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pusa.data.shard import HASH_DIGITS, Shard
from pusa.data.writer import write_hashed_shard
from pusa.errors import TableError
from pusa.system.files import sha256_file

SIZES = [1_000, 400_000]  # bytes of a value: many rows in a row group, or one


def is_intact(path) -> bool:
    return path.stem.endswith(f"-{sha256_file(path)[:HASH_DIGITS]}")


def write_shard(folder, size, compression="none", rows=9):
    schema = pa.schema(
        [
            pa.field("key", pa.string(), nullable=False),
            pa.field("shape", pa.list_(pa.int32()), nullable=False),
            pa.field("data", pa.binary(size), nullable=False),
        ]
    )
    generator = np.random.default_rng(0)
    made = [{"key": f"k{i}", "shape": [i, 2], "data": generator.bytes(size)} for i in range(rows)]
    return write_hashed_shard(folder, "part", made, schema, compression, {"dtype": "x"}), made


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_any_row_is_read_in_any_order(tmp_path, size, compression):
    path, made = write_shard(tmp_path, size, compression)
    shard = Shard(path)
    assert len(shard) == 9 and shard.facts == {"dtype": "x"}
    for row in (8, 0, 4, 4, 7, 1):
        assert shard.row(row, ["key", "shape", "data"]) == made[row]
        if compression == "none":
            assert shard.map_value(row, "data") == made[row]["data"]


def test_a_mapped_value_is_the_files_own_memory(tmp_path):
    path, _ = write_shard(tmp_path, SIZES[1])
    shard = Shard(path)
    view = shard.map_value(3, "data")
    assert shard.map_value(3, "data").obj is view.obj  # both are views of one mapping: nothing was copied
    view[:4] = b"mine"
    assert is_intact(path)  # nothing written to it reaches the file


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("size", SIZES)
def test_flipped_bytes_are_detected_at_the_first_read(tmp_path, size, compression):
    path, made = write_shard(tmp_path, size, compression)
    data = bytearray(path.read_bytes())
    place = data.find(made[5]["data"][100:200]) if compression == "none" else len(data) * 6 // 10
    data[place] ^= 1
    path.write_bytes(data)
    assert not is_intact(path)
    shard = Shard(path)
    read = shard.map_value if compression == "none" else lambda row, column: shard.row(row, [column])
    with pytest.raises(TableError, match="verify: all"):
        for row in range(9):
            read(row, "data")


def test_a_shard_that_cannot_be_written_completely_leaves_nothing(tmp_path, monkeypatch):
    def full(*given, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(OSError, match=r"part\.parquet"):
        write_shard(tmp_path, 10)
    assert list(tmp_path.iterdir()) == []
