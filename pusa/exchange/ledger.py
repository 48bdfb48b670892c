"""Keep a ledger of the pairs that were read and their rows of the catalogue, so that no pair is read twice."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pusa.data.schema import ROWS
from pusa.data.shard import HASH_DIGITS
from pusa.data.writer import write_hashed_shard
from pusa.precompute.table import CLIP_COLUMNS
from pusa.system.files import sha256_file
from pusa.system.text import first_line

log = logging.getLogger(__name__)
PREFIX = "pairs"
READ = pa.schema(
    [
        pa.field("pair", pa.string(), nullable=False),  # pair_key of the files when they were read
        *(ROWS.field(name) for name in (*CLIP_COLUMNS, "key", "text_key")),
        pa.field("dtype", pa.string(), nullable=False),  # of the latents
    ]
)


@dataclass
class ImportLedger:
    """The pairs that were read, in files of a folder, named by the hash of their bytes.

    `refresh` reads the files that other processes have added.
    """

    folder: Path
    row_keys: dict[str, tuple[str, str]] = field(default_factory=dict)  # pair -> keys of its latents and its text
    _tables: dict[str, pa.Table] = field(default_factory=dict)  # by file name

    def refresh(self) -> None:
        """Read the files that are new."""
        for path in self._paths():
            if path.name not in self._tables and (table := _read(path)) is not None:
                self._tables[path.name] = table
                columns = (table[name].to_pylist() for name in ("pair", "key", "text_key"))
                self.row_keys |= {pair: (key, text) for pair, key, text in zip(*columns, strict=True)}

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Record the rows of pairs; their shards must be on the disk already."""
        self._write(pa.Table.from_pylist(list(rows), schema=READ))
        self.refresh()

    def rows(self, pairs: Sequence[str]) -> pa.Table:
        """Return the rows of pairs in the given order; all must be in the ledger."""
        table = pa.concat_tables([READ.empty_table(), *self._tables.values()])
        rows = {pair: row for row, pair in enumerate(table["pair"].to_pylist())}
        return table.take(pa.array([rows[pair] for pair in pairs], pa.int64()))

    def compact(self, pairs: Sequence[str]) -> None:
        """Rewrite the ledger as one file with only those of the given pairs that it has. Call it only while alone."""
        self.refresh()
        known = [pair for pair in pairs if pair in self.row_keys]
        if [table["pair"].to_pylist() for table in self._tables.values()] == [known]:
            (kept,) = self._tables
        else:
            kept = self._write(self.rows(known)).name
        for path in self._paths():
            if path.name != kept:
                path.unlink()

    def _paths(self) -> list[Path]:
        return sorted(path for path in self.folder.glob(f"{PREFIX}-*.parquet") if path.is_file())

    def _write(self, table: pa.Table) -> Path:
        return write_hashed_shard(self.folder, PREFIX, table, READ)


def _read(path: Path) -> pa.Table | None:
    """Read a file of the ledger; return None if it is damaged, since the pairs can be read again."""
    try:
        if sha256_file(path)[:HASH_DIGITS] != path.stem.rpartition("-")[2]:
            raise ValueError("its SHA-256 is not that in its name")
        return pq.read_table(path, page_checksum_verification=True).select(READ.names).cast(READ)
    except (OSError, LookupError, ValueError, TypeError, pa.ArrowException) as error:
        log.warning("%s cannot be read, so its pairs are read again: %s", path, first_line(error))
        return None
