"""Read tables: check the index, then read whole parts, or single rows of shards."""

import json
import mmap
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, ValidationError

from pusa.data.schema import VERSION
from pusa.data.writer import INDEX
from pusa.errors import TableError
from pusa.system.files import digest, read_json, sha256_file, write_json
from pusa.system.strict import Strict, list_problems


class Entry(Strict):
    """One shard in an index."""

    name: str = Field(pattern=r"^[\w-]+\.parquet$")
    rows: int
    bytes: int
    mtime_ns: int
    sha256: str


class Index(Strict):
    """The content of an index file."""

    version: int
    parts: dict[str, list[Entry]]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Table:
    """A complete table: a folder with an index that lists every shard."""

    folder: Path
    parts: dict[str, list[dict[str, Any]]]
    facts: dict[str, Any]

    @classmethod
    def open(cls, folder: Path, part: str | None = None) -> "Table":
        """Read the index of a table.

        Args:
            folder: the table's folder.
            part: a part that this kind of table must have.

        Raises:
            TableError: there is no index (its stage has not finished), or the index is damaged, has another version,
                or belongs to another kind of table.
        """
        index = read_json(folder / INDEX)
        if index is None and (folder / INDEX).exists():
            raise TableError(f"{folder / INDEX} is damaged: it is not JSON; run its stage again")
        if index is None:
            raise TableError(
                f"{folder} has no {INDEX}: it is not a table, or the stage that writes it has not finished"
            )
        stored_version = index.get("version") if isinstance(index, dict) else None
        if stored_version != VERSION:
            raise TableError(
                f"{folder} has schema version {stored_version!r}; this Pusa reads {VERSION}: run its stage again"
            )
        try:
            checked = Index.model_validate(index, strict=True)
        except ValidationError as error:
            raise TableError(
                f"{folder / INDEX} is damaged: {list_problems(error, Index)[0]}; run its stage again"
            ) from error
        if part is not None and part not in checked.parts:
            raise TableError(f"{folder} is a table of {', '.join(checked.parts)}; expected a table with {part}")
        return cls(
            folder, {name: [dict(entry) for entry in entries] for name, entries in checked.parts.items()}, checked.facts
        )

    def fact(self, name: str) -> Any:
        """Return one of the facts in the index.

        Raises:
            TableError: the index does not have it.
        """
        if name not in self.facts:
            raise TableError(f"{self.folder / INDEX} does not have the fact {name}; run its stage again")
        return self.facts[name]

    def rows(self, part: str) -> int:
        """Return the number of rows of a part."""
        return sum(shard["rows"] for shard in self.parts[part])

    def read(self, part: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Read a whole part into memory.

        Raises:
            TableError: a shard is missing, is damaged (pages have checksums), or has not the rows that the index lists.
        """
        return pa.concat_tables([self._shard(shard, columns) for shard in self.parts[part]])

    @property
    def fingerprint(self) -> str:
        """Identify the content: by the fact `content`, else by the hash of the shards' hashes."""
        shards = {part: [shard["sha256"] for shard in shards] for part, shards in self.parts.items()}
        return self.facts.get("content") or digest(shards)[:16]

    def is_intact(self) -> bool:
        """Return whether every shard is as it was written; shards whose size or time has changed are hashed."""
        shards = [(self.folder / shard["name"], shard) for part in self.parts.values() for shard in part]
        return all(matches_index(path, shard) or _has_hash(path, shard) for path, shard in shards)

    def update_times(self) -> None:
        """Store the present times of shards that were found intact in the index: copied files have new times."""
        parts: dict[str, list[dict[str, Any]]] = {}
        for part, shards in self.parts.items():
            paths = [self.folder / shard["name"] for shard in shards]
            parts[part] = [
                {**shard, "mtime_ns": path.stat().st_mtime_ns} if path.is_file() else shard
                for path, shard in zip(paths, shards, strict=True)
            ]
        if parts != self.parts:
            write_json(self.folder / INDEX, {"version": VERSION, "parts": parts, "facts": self.facts})

    def _shard(self, shard: dict[str, Any], columns: Sequence[str] | None) -> pa.Table:
        path = self.folder / shard["name"]
        try:
            table = pq.read_table(path, columns=columns and list(columns), page_checksum_verification=True)
        except (OSError, pa.ArrowException) as error:
            raise TableError(f"{path} cannot be read: {error}; run the stage that made it again") from error
        if table.num_rows != shard["rows"]:
            raise TableError(f"{path} has {table.num_rows} rows; the index lists {shard['rows']}")
        return table


def matches_index(path: Path, entry: Mapping[str, Any]) -> bool:
    """Return whether a shard has the size and the time that are in the index."""
    if not path.is_file():
        return False
    stat = path.stat()
    return stat.st_size == entry["bytes"] and stat.st_mtime_ns == entry["mtime_ns"]


def _has_hash(path: Path, entry: Mapping[str, Any]) -> bool:
    """Return whether a shard has the hash in the index, which for hashed shards holds only its first digits."""
    return path.is_file() and sha256_file(path).startswith(entry["sha256"])


class Shard:
    """Random access to the rows of a hashed shard; one row group is read at a time.

    Raises:
        TableError: the file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False)
        except (OSError, pa.ArrowException) as error:
            raise self._damaged(error) from error
        counts = (self._file.metadata.row_group(i).num_rows for i in range(self._file.metadata.num_row_groups))
        self._starts = [0, *accumulate(counts)]
        self._group: tuple[int, tuple[str, ...], pa.Table] | None = None  # the last row group that was read

    def __len__(self) -> int:
        return self._starts[-1]

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The facts in the file's metadata."""
        return json.loads((self._file.schema_arrow.metadata or {}).get(b"pusa", b"{}"))

    def row(self, row: int, columns: Sequence[str]) -> dict[str, Any]:
        """Return the values of a row by column; binary values as memoryviews of the row group.

        Raises:
            TableError: a page's checksum is wrong.
        """
        group, place = self._place(row)
        if self._group is None or self._group[:2] != (group, tuple(columns)):
            self._group = (group, tuple(columns), self._read(group, columns))
        return {name: _value(self._group[2][name].chunk(0)[place]) for name in columns}

    def map_value(self, row: int, column: str, check: bool = True) -> memoryview:
        """Return a fixed-length value of an uncompressed shard from the mapped file, without a copy.

        Args:
            row: the row's number.
            column: a column of fixed-length binary values.
            check: read the row group first to verify its checksum.

        Returns:
            writable memory; writes do not reach the file.

        Raises:
            TableError: the checksum is wrong.
        """
        group, place = self._place(row)
        if check:
            self._read(group, [column])
        chunk = self._file.metadata.row_group(group).column(self._columns[column])
        length = self._file.schema_arrow.field(column).type.byte_width
        # Plain values fill the end of the group's only page; the length of its header does not matter.
        end = chunk.data_page_offset + chunk.total_compressed_size
        after = self._starts[group + 1] - self._starts[group] - place
        start = end - after * length
        first = start - start % mmap.PAGESIZE
        # Page faults alone would read in small portions.
        self._map.madvise(mmap.MADV_WILLNEED, first, start + length - first)
        return memoryview(self._map)[start : start + length]

    def _place(self, row: int) -> tuple[int, int]:
        group = bisect_right(self._starts, row) - 1
        return group, row - self._starts[group]

    def _read(self, group: int, columns: Sequence[str]) -> pa.Table:
        try:
            return self._file.read_row_group(group, columns=list(columns), use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> TableError:
        return TableError(
            f"{self.path} cannot be read: {error}; make the table again with `verify: all` (import-latents: --verify): "
            "damaged shards are moved to quarantine, and their rows are made again"
        )

    @cached_property
    def _columns(self) -> dict[str, int]:
        first = self._file.metadata.row_group(0)
        return {first.column(i).path_in_schema: i for i in range(first.num_columns)}

    @cached_property
    def _map(self) -> mmap.mmap:
        with self.path.open("rb") as file:  # copy on write, since torch does not accept read-only memory
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _value(scalar: pa.Scalar) -> Any:
    if pa.types.is_binary(scalar.type) or pa.types.is_fixed_size_binary(scalar.type):
        return memoryview(scalar.as_buffer()).cast("B")
    return scalar.as_py()
