"""Which pairs were read, and what each gave to the catalogue: kept through kills, so that none is read twice."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pusa.data.schema import ROWS
from pusa.data.writer import write_shard
from pusa.precompute.table import CLIP_COLUMNS
from pusa.system.files import digest

log = logging.getLogger(__name__)
PREFIX = "pairs-"
READ = pa.schema(
    [
        pa.field("pair", pa.string(), nullable=False),  # what names the files as they were
        *(ROWS.field(name) for name in (*CLIP_COLUMNS, "key", "text_key")),
        pa.field("dtype", pa.string(), nullable=False),  # of the latents
    ]
)


@dataclass
class ReadPairs:
    """The pairs that were read, in files of a folder. Others may add some at any time; `look` sees them."""

    folder: Path
    keys: dict[str, tuple[str, str]] = field(default_factory=dict)  # pair -> key of its latents, of its text
    _tables: dict[str, pa.Table] = field(default_factory=dict)  # by file

    def look(self) -> None:
        """Take in the files that have come since."""
        for path in sorted(self.folder.glob(f"{PREFIX}*.parquet")):
            if path.name not in self._tables and (table := _read(path)) is not None:
                self._tables[path.name] = table
                columns = (table[name].to_pylist() for name in ("pair", "key", "text_key"))
                self.keys |= {pair: (key, text) for pair, key, text in zip(*columns, strict=True)}

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Remember what pairs gave, once that is on the disk."""
        self._write(pa.Table.from_pylist(list(rows), schema=READ))
        self.look()

    def rows(self, pairs: Sequence[str]) -> pa.Table:
        """What these pairs gave, in this order; all of them are known."""
        table = pa.concat_tables([READ.empty_table(), *self._tables.values()])
        places = {pair: row for row, pair in enumerate(table["pair"].to_pylist())}
        return table.take(pa.array([places[pair] for pair in pairs], pa.int64()))

    def compact(self, pairs: Sequence[str]) -> None:
        """Keep these pairs alone, those that are known, in one file. Only for who is alone."""
        self.look()
        known = [pair for pair in pairs if pair in self.keys]
        kept = self._path(known)
        if kept.name not in self._tables:
            self._write(self.rows(known))
        for path in self.folder.glob(f"{PREFIX}*.parquet"):
            if path != kept:
                path.unlink()

    def _write(self, table: pa.Table) -> None:
        path = self._path(table["pair"].to_pylist())
        write_shard(path, table, READ)
        self._tables.pop(path.name, None)

    def _path(self, pairs: Sequence[str]) -> Path:
        return self.folder / f"{PREFIX}{digest(list(pairs))[:32]}.parquet"


def _read(path: Path) -> pa.Table | None:
    """A file's rows; none where it is damaged: the pairs are there to be read again."""
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        return table.cast(READ) if table.schema.names == READ.names else None
    except (OSError, pa.ArrowException) as error:
        log.warning("%s cannot be read, so its pairs are read again: %s", path, error)
        return None
