"""Write tables: each shard whole under its own name, then the index that names them all."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pusa.data.schema import VERSION
from pusa.system.files import atomic, publish, scratch, sha256_file, write_json

INDEX = "index.json"
STAMP = 32  # hexadecimal digits of the content's hash in a stamped shard's name
GROUP_BYTES = 256 * 1024  # a row group has as many rows as this has, one at least: what one random read costs


def write_shard(path: Path, rows: Sequence[Mapping[str, Any]] | pa.Table, schema: pa.Schema) -> None:
    """One Parquet file, atomically."""
    with atomic(path) as partial:
        pq.write_table(_table(rows, schema), partial, compression="zstd", write_page_checksum=True)


def write_stamped(
    folder: Path,
    prefix: str,
    rows: Sequence[Mapping[str, Any]],
    schema: pa.Schema,
    compression: str = "zstd",
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """One Parquet file for random reading, named PREFIX-HASH.parquet by its own bytes, so that damage shows.

    Every column of a row group is one page, and values are plain: where nothing is compressed, arrays of fixed length
    lie in the file as they are.

    Args:
        folder: where it goes.
        prefix: the first part of its name.
        rows: at least one.
        schema: their columns.
        compression: "zstd" or "none".
        facts: what the file says of itself, under "pusa" in its metadata.
    """
    table = _table(rows, schema).replace_schema_metadata({"pusa": json.dumps(facts or {})})
    per_group = max(1, GROUP_BYTES * len(rows) // max(1, table.nbytes))
    with scratch(folder / f"{prefix}.parquet") as partial:
        pq.write_table(
            table, partial, compression=compression, write_page_checksum=True, use_dictionary=False,
            row_group_size=per_group, data_page_size=2**30, write_batch_size=2**20, max_rows_per_page=2**20,
            write_statistics=False,
        )  # fmt: skip
        path = folder / f"{prefix}-{sha256_file(partial)[:STAMP]}.parquet"
        publish(partial, path)
    return path


def write_index(
    folder: Path, shards: Mapping[str, Sequence[Path]], facts: Mapping[str, Any], stamped: Sequence[str] = ()
) -> None:
    """Declare the table complete.

    Args:
        folder: where the shards lie.
        shards: part name (e.g. "clips", "rejects") -> its files, in order.
        facts: what the whole table says of itself.
        stamped: the parts whose shards have their hash in their name; they are not read again.
    """
    parts = {part: [_entry(path, part in stamped) for path in paths] for part, paths in shards.items()}
    write_json(folder / INDEX, {"version": VERSION, "parts": parts, "facts": dict(facts)})


def _table(rows: Sequence[Mapping[str, Any]] | pa.Table, schema: pa.Schema) -> pa.Table:
    return (
        rows.select(schema.names).cast(schema)
        if isinstance(rows, pa.Table)
        else pa.Table.from_pylist(list(rows), schema=schema)
    )


def _entry(path: Path, stamped: bool) -> dict[str, Any]:
    stat = path.stat()
    return {
        "name": path.name,
        "rows": pq.read_metadata(path).num_rows,
        "bytes": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "sha256": path.stem.rpartition("-")[2] if stamped else sha256_file(path),
    }
