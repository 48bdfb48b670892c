"""Write tables: each shard whole under its own name, then the index that names them all."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pusa.data.schema import VERSION
from pusa.files import atomic, sha256_file, write_json

INDEX = "index.json"


def write_shard(path: Path, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> None:
    """One Parquet file, atomically."""
    table = pa.Table.from_pylist(list(rows), schema=schema)
    with atomic(path) as partial:
        pq.write_table(table, partial, compression="zstd", write_page_checksum=True)


def write_index(folder: Path, shards: Mapping[str, Sequence[Path]], facts: Mapping[str, Any]) -> None:
    """Declare the table complete.

    Args:
        folder: where the shards lie.
        shards: part name (e.g. "clips", "rejects") -> its files, in order.
        facts: what the whole table says of itself.
    """
    parts = {part: [_entry(path) for path in paths] for part, paths in shards.items()}
    write_json(folder / INDEX, {"version": VERSION, "parts": parts, "facts": dict(facts)})


def _entry(path: Path) -> dict[str, Any]:
    rows = pq.read_metadata(path).num_rows
    return {"name": path.name, "rows": rows, "bytes": path.stat().st_size, "sha256": sha256_file(path)}
