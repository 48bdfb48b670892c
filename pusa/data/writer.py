"""Write tables: first each shard, atomically, then the index that lists them all and makes the table complete."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pusa.data.schema import VERSION
from pusa.data.shard import HASH_DIGITS, hash_footer
from pusa.errors import StageError
from pusa.system.files import atomic, own_digest, publish, scratch, sha256_file, write_json

INDEX = "index.json"
GROUP_BYTES = 256 * 1024  # target size of a row group, which is what one random read costs; it has at least one row


def write_shard(path: Path, rows: Sequence[Mapping[str, Any]] | pa.Table, schema: pa.Schema) -> None:
    """Write one Parquet file atomically.

    Raises:
        StageError: the path is not UTF-8, which Parquet's library needs.
        OSError: the file cannot be written.
    """
    _require_utf8(path)
    with atomic(path) as partial:
        pq.write_table(_table(rows, schema), partial, compression="zstd", write_page_checksum=True)


def write_hashed_shard(
    folder: Path,
    prefix: str,
    rows: Sequence[Mapping[str, Any]] | pa.Table,
    schema: pa.Schema,
    compression: str = "zstd",
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Write one Parquet file for random reading, named PREFIX-HASH.parquet by the hash of its bytes.

    Every column of a row group is one page with plain encoding: without compression, arrays of fixed length are stored
    in the file as they are in memory, and can be mapped.

    Args:
        folder: where to write it.
        prefix: the first part of the file's name.
        rows: at least one.
        schema: the columns.
        compression: "zstd" or "none".
        facts: JSON values that describe the file, stored under "pusa" in its metadata.

    Returns:
        the path of the file.

    Raises:
        StageError: the path is not UTF-8, which Parquet's library needs.
        OSError: the file cannot be written.
    """
    _require_utf8(folder)
    table = _table(rows, schema).replace_schema_metadata({"pusa": json.dumps(facts or {})})
    per_group = max(1, GROUP_BYTES * len(rows) // max(1, table.nbytes))
    with scratch(folder / f"{prefix}.parquet") as partial:
        pq.write_table(
            table, partial, compression=compression, write_page_checksum=True, use_dictionary=False,
            row_group_size=per_group, data_page_size=2**30, write_batch_size=2**20, max_rows_per_page=2**20,
            write_statistics=False,
        )  # fmt: skip
        path = folder / f"{prefix}-{sha256_file(partial)[:HASH_DIGITS]}.parquet"
        publish(partial, path)
    return path


def _require_utf8(path: Path) -> None:
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise StageError(f"{path} is not UTF-8, which the path of a table must be; name another folder") from error


def write_index(
    folder: Path, shards: Mapping[str, Sequence[Path]], facts: Mapping[str, Any], hashed: Sequence[str] = ()
) -> None:
    """Write the index, which makes a table complete.

    Args:
        folder: the folder of the shards.
        shards: for each part (such as "clips" or "rejects") its files, in order.
        facts: JSON values that describe the table.
        hashed: the parts written by `write_hashed_shard`; their hashes are taken from the file names.
    """
    save_index(
        folder, {part: [_entry(path, part in hashed) for path in paths] for part, paths in shards.items()}, facts
    )


def save_index(folder: Path, parts: Mapping[str, Sequence[Mapping[str, Any]]], facts: Mapping[str, Any]) -> None:
    """Write an index of these entries, with its own hash: training reads the statistics of latents from its facts."""
    index = {"version": VERSION, "parts": dict(parts), "facts": dict(facts)}
    write_json(folder / INDEX, {**index, "sha256": own_digest(index)})


def _table(rows: Sequence[Mapping[str, Any]] | pa.Table, schema: pa.Schema) -> pa.Table:
    if isinstance(rows, pa.Table):
        return rows.select(schema.names).cast(schema)
    return pa.Table.from_pylist(list(rows), schema=schema)


def _entry(path: Path, hashed: bool) -> dict[str, Any]:
    stat = path.stat()
    return {
        "name": path.name,
        "rows": pq.read_metadata(path).num_rows,
        "bytes": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "sha256": path.stem.rpartition("-")[2] if hashed else sha256_file(path),
        "footer": hash_footer(path),
    }
