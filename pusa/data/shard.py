"""Read the Parquet files of a table, whole or row by row. Damage of any kind is a `TableError`.

Three things show that a file is as it was written. Each page has a checksum, which Arrow verifies. Small files are
hashed as they are read. Files for random reading may be large: their footer, which says where everything is, has a hash
in the index, and each of their rows has a key.
"""

import hashlib
import mmap
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pusa.data.schema import BUCKET, LENGTHS, OPTIONAL, RANGES
from pusa.errors import TableError
from pusa.system.failures import RUN_ERRNOS
from pusa.system.files import parse_json, state_of
from pusa.system.text import first_line

HASH_DIGITS = 32  # hexadecimal digits of the content's hash in a hashed shard's name
FOOTER_END = b"PAR1"
MAX_FOOTER = 1 << 28  # bytes
Entry = Mapping[str, Any]  # of a shard in an index: name, rows, bytes, mtime_ns, sha256, footer
# What Arrow and Python raise for bytes that nobody wrote on purpose: texts that are not UTF-8, impossible sizes.
READ_ERRORS = (OSError, ValueError, LookupError, TypeError, ArithmeticError, MemoryError, pa.ArrowException)


@contextmanager
def damage_of(path: Path) -> Iterator[None]:
    """Raise each error of reading a file as a `TableError` that names it."""
    try:
        yield
    except TableError:
        raise
    except READ_ERRORS as error:
        if isinstance(error, OSError) and error.errno in RUN_ERRNOS:  # too many open files are not damage
            raise
        raise _damaged(path, first_line(error) or type(error).__name__) from error


def _damaged(path: Path, why: str) -> TableError:
    return TableError(
        f"{path} cannot be read: {why}; run the stage that made it again, for latents and texts with `verify: all` "
        "(import-latents: --verify): damaged shards are moved to quarantine, and their rows are made again"
    )


def read_columns(path: Path, columns: Sequence[str], schema: pa.Schema, entry: Entry | None = None) -> pa.Table:
    """Read columns of a file into memory, and check that they have the types of `schema` and no missing values.

    Args:
        path: the file.
        columns: the names of the columns.
        schema: the columns that the file should have, among others.
        entry: that of the index, if there is one. A file whose whole hash is in it is hashed as it is read.

    Of `OPTIONAL`, missing values and a missing column are null.

    Raises:
        TableError: the file is missing, damaged, or another one than the index lists.
    """
    with damage_of(path):
        _state_of(path)
        source: Any = path
        if entry and len(entry["sha256"]) > HASH_DIGITS:
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() != entry["sha256"]:
                raise _damaged(path, "its SHA-256 is not that in the index")
            source = pa.BufferReader(data)
        elif entry:
            _check_footer(path, entry)
        with pq.ParquetFile(source, page_checksum_verification=True) as file:
            if entry and file.metadata.num_rows != entry["rows"]:
                raise _damaged(path, f"it has {file.metadata.num_rows} rows; the index lists {entry['rows']}")
            if len(set(file.schema_arrow.names)) < len(file.schema_arrow.names):
                raise _damaged(path, "two columns have one name")
            for name in columns:
                expected = schema.field(name).type
                if name in OPTIONAL and name not in file.schema_arrow.names:
                    continue
                found = file.schema_arrow.field(name).type if name in file.schema_arrow.names else "missing"
                if found != expected and not all(map(_is_array, (found, expected))):
                    raise _damaged(path, f"column {name} is {found}; expected {expected}")
            table = _with_optional(file.read(list(columns)), columns)
        _check_values(table, file.metadata.num_rows)
        return table.replace_schema_metadata()


def hash_footer(path: Path) -> str:
    """Return the hash of a Parquet file's footer: its schema, its metadata and the places of its pages.

    Raises:
        ValueError: the file has no footer.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        end = len(FOOTER_END) + 4
        file.seek(max(0, size - end))
        length, mark = int.from_bytes(file.read(4), "little"), file.read()
        if mark != FOOTER_END or length + end > min(size, MAX_FOOTER):
            raise ValueError("it does not end like a Parquet file")
        file.seek(size - end - length)
        return hashlib.sha256(file.read(length)).hexdigest()[:HASH_DIGITS]


class Shard:
    """Random access to the rows of a hashed shard; one row group is read at a time.

    Args:
        path: the file.
        entry: that of the index, if there is one.

    Raises:
        TableError: the file is missing, damaged, or another one than the index lists.
    """

    def __init__(self, path: Path, entry: Entry | None = None) -> None:
        self.path = path
        with damage_of(path):
            self._opened = _state_of(path)
            if entry:
                _check_footer(path, entry)
            self._file = pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False)
            metadata = self._file.metadata
            counts = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
            if min(counts, default=0) < 0 or (entry and sum(counts) != entry["rows"]):
                raise _damaged(
                    path, f"it has {sum(counts)} rows; the index lists {entry['rows'] if entry else 'others'}"
                )
        self._starts = [0, *accumulate(counts)]
        self._group: tuple[int, tuple[str, ...], pa.Table] | None = None  # the last row group that was read

    def __len__(self) -> int:
        return self._starts[-1]

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The facts in the file's metadata.

        Raises:
            TableError: they are not a JSON object.
        """
        with damage_of(self.path):
            facts = parse_json((self._file.schema_arrow.metadata or {}).get(b"pusa", b"{}"))
        if not isinstance(facts, dict):
            raise _damaged(self.path, "its facts are not a JSON object")
        return facts

    def require_unchanged(self) -> None:
        """Refuse to read on if the file was changed, replaced or removed since it was opened.

        Raises:
            TableError: it was.
        """
        with damage_of(self.path):
            if _state_of(self.path) != self._opened:
                raise TableError(
                    f"{self.path} was changed while it was read; another run may write this table: wait until it is "
                    "done, then run this again"
                )

    def row(self, row: int, columns: Sequence[str]) -> dict[str, Any]:
        """Return the values of a row by column; binary values as memoryviews of the row group.

        Raises:
            TableError: the row or column does not exist, or a page's checksum is wrong.
        """
        group, place = self._place(row)
        if self._group is None or self._group[:2] != (group, tuple(columns)):
            self._group = (group, tuple(columns), self._read(group, columns))
        with damage_of(self.path):
            return {name: _value(self._group[2][name].chunk(0)[place]) for name in columns}

    def map_value(self, row: int, column: str, check: bool = True) -> memoryview:
        """Return a fixed-length value of an uncompressed shard from the mapped file, without a copy.

        Args:
            row: the row's number.
            column: a column of fixed-length binary values.
            check: read the row group first to verify its checksum, and that the value is where it is expected.

        Returns:
            writable memory; writes do not reach the file.

        Raises:
            TableError: the checksum is wrong, or the column is not stored in this way.
        """
        group, place = self._place(row)
        with damage_of(self.path):
            chunk = self._file.metadata.row_group(group).column(self._columns[column])
            kind = self._file.schema_arrow.field(column).type
            if not _is_array(kind):
                raise _damaged(self.path, f"column {column} is {kind}; expected values of one length")
            # Plain values fill the end of the group's only page; the length of its header does not matter.
            end = chunk.data_page_offset + chunk.total_compressed_size
            start = end - (self._starts[group + 1] - self._starts[group] - place) * kind.byte_width
            if not 0 <= start <= start + kind.byte_width <= len(self._map):
                raise _damaged(self.path, f"row {row} of column {column} is outside of the file")
            value = memoryview(self._map)[start : start + kind.byte_width]
            if check and not pa.py_buffer(value).equals(
                self._read(group, [column])[column].chunk(0)[place].as_buffer()
            ):
                raise _damaged(self.path, f"row {row} of column {column} is not where its footer says")
            # Page faults alone would read in small portions.
            first = start - start % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, first, start + kind.byte_width - first)
            return value

    def _place(self, row: int) -> tuple[int, int]:
        if not 0 <= row < len(self):
            raise _damaged(self.path, f"it has {len(self)} rows; row {row} is needed")
        group = bisect_right(self._starts, row) - 1
        return group, row - self._starts[group]

    def _read(self, group: int, columns: Sequence[str]) -> pa.Table:
        with damage_of(self.path):
            read = self._file.read_row_group(group, columns=list(columns), use_threads=False)
            table = _with_optional(read, columns)
            _check_values(table, self._starts[group + 1] - self._starts[group])
            return table.combine_chunks()

    @cached_property
    def _columns(self) -> dict[str, int]:
        first = self._file.metadata.row_group(0)
        return {first.column(i).path_in_schema: i for i in range(first.num_columns)}

    @cached_property
    def _map(self) -> mmap.mmap:
        with self.path.open("rb") as file:  # copy on write, since torch does not accept read-only memory
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.require_unchanged()
        return mapped


def _state_of(path: Path) -> tuple[int, ...]:
    """Return a file's state without its ctime: a new link to a shard or another mode must not end a long training."""
    state = state_of(path)
    if not path.is_file():  # opening anything else might never return
        raise OSError("it is not a file")
    return state[:-1]


def _is_array(kind: Any) -> bool:
    """Return whether a column holds arrays of latents; their length is that of the clips' shape."""
    return isinstance(kind, pa.FixedSizeBinaryType)


def _check_footer(path: Path, entry: Entry) -> None:
    if entry.get("footer") and hash_footer(path) != entry["footer"]:
        raise _damaged(path, "its footer is not that in the index")


def _with_optional(table: pa.Table, columns: Sequence[str]) -> pa.Table:
    """Return the columns in their order; those of `OPTIONAL` that the file lacks are null."""
    for name in OPTIONAL.keys() & set(columns) - set(table.column_names):
        table = table.append_column(name, pa.nulls(table.num_rows, OPTIONAL[name]))
    return table.select(list(columns))


def _check_values(table: pa.Table, rows: int) -> None:
    """Check values that came from a file: their number, offsets, encoding and ranges, and that none is missing.

    Raises:
        ValueError: they are wrong.
    """
    table.validate(full=True)
    for name, column in zip(table.column_names, table.columns, strict=True):
        inner = pc.list_flatten(column).null_count if pa.types.is_list(column.type) else 0
        if (column.null_count and name not in OPTIONAL) or inner:
            raise ValueError(f"column {name} has missing values")
        if table.num_rows:
            _check_range(name, column)
    if table.num_rows != rows:
        raise ValueError(f"{table.num_rows} of {rows} rows can be read")


def _check_range(name: str, column: pa.ChunkedArray) -> None:
    if name in LENGTHS and not _is_within(pc.list_value_length(column), LENGTHS[name]):
        raise ValueError(f"column {name} has a list of impossible length")
    numbers = pc.list_flatten(column) if name in LENGTHS else column
    if name in RANGES and not _is_within(numbers, RANGES[name]):
        raise ValueError(f"column {name} has a value that is not in {RANGES[name][0]:g}..{RANGES[name][1]:g}")
    if name == "bucket" and not pc.all(pc.match_substring_regex(column, BUCKET)).as_py():
        raise ValueError("column bucket has a value that is not WIDTHxHEIGHTxFRAMES")


def _is_within(numbers: pa.ChunkedArray, limits: tuple[float, float]) -> bool:
    ends = pc.min_max(numbers).as_py()
    finite = not pa.types.is_floating(numbers.type) or pc.all(pc.is_finite(numbers)).as_py()
    return bool(finite and limits[0] <= ends["min"] and ends["max"] <= limits[1])


def _value(scalar: pa.Scalar) -> Any:
    if not scalar.is_valid:
        return None
    if pa.types.is_binary(scalar.type) or pa.types.is_fixed_size_binary(scalar.type):
        return memoryview(scalar.as_buffer()).cast("B")
    return scalar.as_py()
