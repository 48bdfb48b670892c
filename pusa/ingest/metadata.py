"""Read metadata files: one row for each video, in CSV, JSON lines or Parquet. Names of columns are compared in NFC."""

import csv
import itertools
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TextIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pusa.errors import ManifestError
from pusa.system.names import nfc
from pusa.system.text import join_names

MAX_ROW_CHARACTERS = 16 * 1024 * 1024  # of a row, and of a field of CSV, where Python's own limit of 128 Ki is too low
MAX_TEXT_BYTES = 4 * 1024 * 1024  # of a text in Parquet: a caption has at most a million characters
MAX_NAME_CHARACTERS = 4096  # of a file; Linux opens no longer path
MAX_ROWS = 10_000_000
MAX_COLUMNS = 10_000
MAX_COLUMN_BYTES = 2**30  # of a Parquet column in one row group, uncompressed
BATCH_ROWS = 65_536  # with each batch comes a copy of the dictionary


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a metadata file. The values in its two columns may be of any type."""

    number: int  # the line; for Parquet, the row from 1 on
    file: Any
    caption: Any
    preview: str  # the beginning of the row if it names no file, else ""


class RepeatedColumn(ValueError):
    """Two columns have the same name."""


class TooMuch(ValueError):
    """The file has more rows, columns or bytes than are read."""


@dataclass(frozen=True, slots=True)
class NotText:
    """A value that is neither text nor a number. It may be huge or too deep to be printed, so only its type is kept."""

    kind: str

    def __repr__(self) -> str:
        return f"of type {self.kind:.100}"


class UnreadableRow(str):
    """A row that could not be parsed; the text is the reason."""

    __slots__ = ()


def read_rows(path: Path, file_column: str, caption_column: str) -> Iterator[Row]:
    """Yield the rows of a metadata file.

    Raises:
        ManifestError: the file cannot be read, it has two columns of one name, more rows, columns or bytes than are
            read, or no row has one of the columns.
    """
    file_column, caption_column = nfc(file_column), nfc(caption_column)
    columns: dict[str, None] = {}
    count = 0
    try:
        for number, row in READERS[path.suffix.lower()](path, (file_column, caption_column), columns):
            values = row if isinstance(row, Mapping) else {}
            if (count := count + 1) > MAX_ROWS:
                raise TooMuch(f"it has more than {MAX_ROWS:,} rows; divide it")
            file, preview = values.get(file_column), ""
            if isinstance(file, str) and len(file) > MAX_NAME_CHARACTERS:
                row = UnreadableRow(f"it names a file by {len(file):,} characters: {file[:200]!r:.160}")
                file = None
            if not isinstance(file, str):
                preview = row if isinstance(row, UnreadableRow) else f"{row!r:.200}"
            yield Row(number, file, values.get(caption_column), preview)
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException, RepeatedColumn, TooMuch) as error:
        raise ManifestError(f"{path} cannot be read: {error}") from error
    for column in (file_column, caption_column):
        if column not in columns:
            raise ManifestError(f"{path} has no column {column!r}; it has {join_names(columns) or 'none'}")


def _distinct(columns: Iterable[str], of: str = "it") -> list[str]:
    """Return the names of columns in NFC; those without a name, which a spreadsheet may append, may be many.

    Raises:
        RepeatedColumn: two have the same name.
    """
    names = list(map(nfc, columns))
    if len(set(names)) == len(names):  # this is called for each line of a file
        return names
    if repeated := [name for name, count in Counter(names).items() if count > 1 and name]:
        raise RepeatedColumn(f"{of} has the column {repeated[0]!r:.80} twice; rename or remove one")
    return names


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON, in which a later key would silently replace an earlier one of the same name."""
    return dict(zip(_distinct((key for key, _ in pairs), "the object"), (value for _, value in pairs), strict=True))


# Each reader yields (number, row) and adds the names of the columns that it sees to `columns`. `needed` are the columns
# that will be used.


class _Lines:
    """The lines of a CSV file, as the csv module takes them. A row that is too long is not read to its end."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self.characters = 0  # since the last row

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        line = self._file.readline(MAX_ROW_CHARACTERS + 1)
        self.characters += len(line)
        if self.characters > MAX_ROW_CHARACTERS:
            raise csv.Error(f"the row has more than {MAX_ROW_CHARACTERS:,} characters")
        if not line:
            raise StopIteration
        return line


def _read_csv(path: Path, needed: Iterable[str], columns: dict[str, None]) -> Iterator[tuple[int, Any]]:
    """Read CSV strictly. Otherwise a quote that is never closed would swallow all rows after it."""
    csv.field_size_limit(MAX_ROW_CHARACTERS)
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = _Lines(file)
        reader = csv.reader(lines, strict=True)
        line = 1
        try:
            names = _distinct(next(reader, []))
            if len(names) > MAX_COLUMNS:
                raise TooMuch(f"it has {len(names):,} columns; allowed are {MAX_COLUMNS:,}")
            columns |= dict.fromkeys(names)
            places = {name: place for place, name in enumerate(names) if name in needed}
            lines.characters = 0
            line = reader.line_num + 1
            for row in reader:
                if len(row) > len(names):  # for example, a caption with a comma and without quotes
                    yield line, UnreadableRow(f"more fields than columns: {row[: len(names) + 9]!r:.160}")
                elif row:
                    yield line, {name: row[place] if place < len(row) else None for name, place in places.items()}
                lines.characters = 0
                line = reader.line_num + 1  # a field may span several lines
        except csv.Error as error:
            raise csv.Error(f"line {max(line, reader.line_num)}: {error}") from error


def _read_jsonl(path: Path, needed: Iterable[str], columns: dict[str, None]) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number in itertools.count(1):
            line = file.readline(MAX_ROW_CHARACTERS + 1)
            if not line:
                return
            if len(line) > MAX_ROW_CHARACTERS:
                yield number, UnreadableRow(f"more than {MAX_ROW_CHARACTERS:,} characters: {line[:200].strip()!r:.160}")
                while line and not line.endswith("\n"):
                    line = file.readline(MAX_ROW_CHARACTERS)
            elif line.strip():
                row = _parse_json(line)
                if isinstance(row, dict):  # each line may have other columns
                    columns |= dict.fromkeys(row if len(columns) < MAX_COLUMNS else [n for n in needed if n in row])
                yield number, row


def _parse_json(line: str) -> Any:
    try:
        row = json.loads(line, object_pairs_hook=_object)
    except RepeatedColumn as error:
        return UnreadableRow(f"{error}: {line.strip()!r:.160}")
    except (ValueError, RecursionError):  # a syntax error, thousands of digits, or thousands of brackets
        return UnreadableRow(f"not JSON: {line.strip()!r:.160}")
    if not isinstance(row, dict):
        return UnreadableRow(f"not an object: {line.strip()!r:.160}")
    return {name: NotText(type(value).__name__) if isinstance(value, dict | list) else value
            for name, value in row.items()}  # fmt: skip


def _read_parquet(path: Path, needed: Iterable[str], columns: dict[str, None]) -> Iterator[tuple[int, Any]]:
    with pq.ParquetFile(path) as opened:
        schema, rows = opened.schema_arrow, opened.metadata.num_rows
        if len(schema) > MAX_COLUMNS or rows > MAX_ROWS:
            allowed = f"{MAX_ROWS:,} and {MAX_COLUMNS:,}"
            raise TooMuch(f"it states {rows:,} rows and {len(schema):,} columns; allowed are {allowed}")
        stored = dict(zip(_distinct(schema.names), schema.names, strict=True))
        columns |= dict.fromkeys(stored)
        present = {stored[name]: name for name in needed if name in stored}
        others = {name: NotText(str(kind)) for column, name in present.items()
                  if not _is_readable(kind := schema.field(column).type)}  # fmt: skip
        read = [column for column, name in present.items() if name not in others]
        _check_row_groups(opened.metadata, read)
    if not read:
        yield from ((number, others) for number in range(1, rows + 1))
        return
    names, numbers = [present[column] for column in read], itertools.count(1)
    # Texts that repeat stay in a dictionary, as they are in the file. Otherwise one long text may fill the memory.
    with pq.ParquetFile(path, read_dictionary=read) as file:
        for batch in file.iter_batches(BATCH_ROWS, columns=read):
            for row in zip(*map(_values, batch.select(read).columns), strict=True):
                yield next(numbers), {**others, **dict(zip(names, row, strict=True))}


def _check_row_groups(metadata: pq.FileMetaData, columns: Collection[str]) -> None:
    """Refuse a file whose columns would fill the memory. A megabyte can hold gigabytes if they are of one character."""
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for chunk in map(group.column, range(group.num_columns)):
            if chunk.path_in_schema in columns and chunk.total_uncompressed_size > MAX_COLUMN_BYTES:
                size, allowed = f"{chunk.total_uncompressed_size:,}", f"{MAX_COLUMN_BYTES:,}"
                name = chunk.path_in_schema
                raise TooMuch(f"its column {name!r:.80} has {size} bytes in a row group; allowed are {allowed}")


def _is_readable(kind: pa.DataType) -> bool:
    """Return whether values of a type are text or numbers. Others are not read: they may be huge, or out of range."""
    while isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    tests = ("string", "large_string", "integer", "floating", "boolean", "null")
    return any(getattr(pa.types, f"is_{name}")(kind) for name in tests)


def _values(column: pa.Array) -> Iterable[Any]:
    """Return a column's values: texts, numbers and None; `NotText` for texts that are too long or not UTF-8."""
    while isinstance(column, pa.ExtensionArray):
        column = column.storage
    if isinstance(column, pa.DictionaryArray):
        used = column.indices.unique().drop_null()
        values = dict(zip(used.to_pylist(), _values(column.dictionary.take(used)), strict=True))
        return [values.get(index) for index in column.indices.to_pylist()]
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        if (pc.max(pc.binary_length(column)).as_py() or 0) > MAX_TEXT_BYTES:
            return map(_text, column)
        with suppress(UnicodeDecodeError):
            return column.to_pylist()
        return map(_text, column)
    return column.to_pylist()


def _text(value: pa.Scalar) -> Any:
    if not value.is_valid:
        return None
    if (size := value.as_buffer().size) > MAX_TEXT_BYTES:
        return NotText(f"text of {size:,} bytes")
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return NotText("text that is not UTF-8")


READERS = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
SUFFIXES = tuple(READERS)
