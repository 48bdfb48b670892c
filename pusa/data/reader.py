"""Read tables: refuse what is not whole, then hand out parts, or single rows of shards."""

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
    """A shard in an index."""

    name: str = Field(pattern=r"^[\w-]+\.parquet$")
    rows: int
    bytes: int
    mtime_ns: int
    sha256: str


class Index(Strict):
    """What an index file holds."""

    version: int
    parts: dict[str, list[Entry]]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Table:
    """A complete table: a folder whose index names every shard."""

    folder: Path
    parts: dict[str, list[dict[str, Any]]]
    facts: dict[str, Any]

    @classmethod
    def open(cls, folder: Path, part: str | None = None) -> "Table":
        """Read the index.

        Args:
            folder: the table.
            part: one that the table must have, by which its kind is known.

        Raises:
            TableError: there is no index (the stage before was not run to its end), or it is damaged, of another
                version, or another kind of table's.
        """
        index = read_json(folder / INDEX)
        if index is None and (folder / INDEX).exists():
            raise TableError(f"{folder / INDEX} is damaged: no JSON; run its stage again")
        if index is None:
            raise TableError(f"{folder} has no {INDEX}: it is no table, or the stage that writes it has not finished")
        found = index.get("version") if isinstance(index, dict) else None
        if found != VERSION:
            raise TableError(f"{folder} has schema version {found!r}; this Pusa reads {VERSION}: run its stage again")
        try:
            checked = Index.model_validate(index, strict=True)
        except ValidationError as error:
            raise TableError(
                f"{folder / INDEX} is damaged: {list_problems(error, Index)[0]}; run its stage again"
            ) from error
        if part is not None and part not in checked.parts:
            raise TableError(f"{folder} is a table of {', '.join(checked.parts)}; wanted is one with {part}")
        return cls(
            folder, {name: [dict(entry) for entry in some] for name, some in checked.parts.items()}, checked.facts
        )

    def fact(self, name: str) -> Any:
        """What the table says of itself.

        Raises:
            TableError: it does not say that.
        """
        if name not in self.facts:
            raise TableError(f"{self.folder / INDEX} does not tell {name}; run its stage again")
        return self.facts[name]

    def rows(self, part: str) -> int:
        """How many rows a part has."""
        return sum(shard["rows"] for shard in self.parts[part])

    def read(self, part: str, columns: Sequence[str] | None = None) -> pa.Table:
        """A whole part, in memory.

        Raises:
            TableError: a shard is missing, damaged (its pages carry checksums), or has other rows than the index says.
        """
        return pa.concat_tables([self._shard(shard, columns) for shard in self.parts[part]])

    @property
    def fingerprint(self) -> str:
        """What names the content: what its stage says of it, else the hash of the shards' hashes."""
        shards = {part: [shard["sha256"] for shard in shards] for part, shards in self.parts.items()}
        return self.facts.get("content") or digest(shards)[:16]

    def is_whole(self) -> bool:
        """Whether every shard is there as it was written; one whose time has changed is hashed."""
        shards = [(self.folder / shard["name"], shard) for part in self.parts.values() for shard in part]
        return all(is_as_written(path, shard) or _has_hash(path, shard) for path, shard in shards)

    def restamp(self) -> None:
        """Note the times that the shards have now, once they were seen to be right: copies have others."""
        parts = {part: [_restamped(self.folder, shard) for shard in some] for part, some in self.parts.items()}
        if parts != self.parts:
            write_json(self.folder / INDEX, {"version": VERSION, "parts": parts, "facts": self.facts})

    def _shard(self, shard: dict[str, Any], columns: Sequence[str] | None) -> pa.Table:
        path = self.folder / shard["name"]
        try:
            table = pq.read_table(path, columns=columns and list(columns), page_checksum_verification=True)
        except (OSError, pa.ArrowException) as error:
            raise TableError(f"{path} cannot be read: {error}; run the stage that made it again") from error
        if table.num_rows != shard["rows"]:
            raise TableError(f"{path} has {table.num_rows} rows; the index says {shard['rows']}")
        return table


def is_as_written(path: Path, entry: Mapping[str, Any]) -> bool:
    """Whether a shard has the size and the time that the index says."""
    if not path.is_file():
        return False
    stat = path.stat()
    return stat.st_size == entry["bytes"] and stat.st_mtime_ns == entry["mtime_ns"]


def _has_hash(path: Path, entry: Mapping[str, Any]) -> bool:
    """The same by its bytes. Of a stamped shard the index knows the beginning of the hash."""
    return path.is_file() and sha256_file(path).startswith(entry["sha256"])


def _restamped(folder: Path, entry: Mapping[str, Any]) -> dict[str, Any]:
    path = folder / entry["name"]
    return {**entry, "mtime_ns": path.stat().st_mtime_ns if path.is_file() else entry["mtime_ns"]}


class Shard:
    """Random reading of a stamped shard: one row group, of as few rows as are worth it, at a time.

    Raises:
        TableError: it is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False)
        except (OSError, pa.ArrowException) as error:
            raise self._damaged(error) from error
        counts = (self._file.metadata.row_group(i).num_rows for i in range(self._file.metadata.num_row_groups))
        self._starts = [0, *accumulate(counts)]
        self._group: tuple[int, tuple[str, ...], pa.Table] | None = None  # the last one read

    def __len__(self) -> int:
        return self._starts[-1]

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What the file says of itself."""
        return json.loads((self._file.schema_arrow.metadata or {}).get(b"pusa", b"{}"))

    def row(self, row: int, columns: Sequence[str]) -> dict[str, Any]:
        """The values of a row; of binary ones, the memory they lie in.

        Raises:
            TableError: the pages' checksums do not fit.
        """
        group, place = self._place(row)
        if self._group is None or self._group[:2] != (group, tuple(columns)):
            self._group = (group, tuple(columns), self._read(group, columns))
        return {name: _value(self._group[2][name].chunk(0)[place]) for name in columns}

    def mapped(self, row: int, column: str, check: bool = True) -> memoryview:
        """A fixed-length value of an uncompressed shard, as it lies in the mapped file: nothing is copied.

        Args:
            row: which row.
            column: of binary values.
            check: verify the checksum of its row group first, for which that is read once.

        Returns:
            memory; what is written to it stays there.

        Raises:
            TableError: the checksum does not fit.
        """
        group, place = self._place(row)
        if check:
            self._read(group, [column])
        chunk = self._file.metadata.row_group(group).column(self._columns[column])
        length = self._file.schema_arrow.field(column).type.byte_width
        # Plain values fill the end of the group's only page, whatever its header's length.
        end = chunk.data_page_offset + chunk.total_compressed_size
        after = self._starts[group + 1] - self._starts[group] - place
        start = end - after * length
        first = start - start % mmap.PAGESIZE
        self._map.madvise(mmap.MADV_WILLNEED, first, start + length - first)  # page faults alone read little by little
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
            "damaged shards are put aside, and their rows made anew"
        )

    @cached_property
    def _columns(self) -> dict[str, int]:
        first = self._file.metadata.row_group(0)
        return {first.column(i).path_in_schema: i for i in range(first.num_columns)}

    @cached_property
    def _map(self) -> mmap.mmap:
        with self.path.open("rb") as file:  # copy on write: torch takes no memory that is for reading alone
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _value(scalar: pa.Scalar) -> Any:
    if pa.types.is_binary(scalar.type) or pa.types.is_fixed_size_binary(scalar.type):
        return memoryview(scalar.as_buffer()).cast("B")
    return scalar.as_py()
