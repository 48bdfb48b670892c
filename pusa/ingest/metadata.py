"""Read metadata files: one row for each video, in CSV, JSON lines or Parquet. Names of columns are compared in NFC."""

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pusa.errors import ManifestError
from pusa.system.names import nfc
from pusa.system.text import join_names

MAX_FIELD_CHARACTERS = 16 * 1024 * 1024  # of CSV; at Python's own limit of 128 Ki, one field ends the whole file
BATCH_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a metadata file. The values in its two columns may be of any type."""

    number: int  # the line; for Parquet, the row from 1 on
    file: Any
    caption: Any
    preview: str  # the beginning of the row if it names no file, else ""


class RepeatedColumn(ValueError):
    """Two columns have the same name."""


class UnreadableRow(str):
    """A row that could not be parsed; the text is the reason."""

    __slots__ = ()


def read_rows(path: Path, file_column: str, caption_column: str) -> Iterator[Row]:
    """Yield the rows of a metadata file.

    Raises:
        ManifestError: the file cannot be read, it has two columns of one name, or no row has one of the columns.
    """
    file_column, caption_column = nfc(file_column), nfc(caption_column)
    columns: dict[str, None] = {}
    try:
        for number, row in READERS[path.suffix.lower()](path, (file_column, caption_column), columns):
            values = row if isinstance(row, Mapping) else {}
            columns |= dict.fromkeys(map(str, values))
            file, preview = values.get(file_column), ""
            if not isinstance(file, str):
                preview = row if isinstance(row, UnreadableRow) else f"{row!r:.200}"
            yield Row(number, file, values.get(caption_column), preview)
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException, RepeatedColumn) as error:
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


def _read_csv(path: Path, needed: Iterable[str], columns: dict[str, None]) -> Iterator[tuple[int, Any]]:
    """Read CSV strictly. Otherwise a quote that is never closed would swallow all rows after it."""
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        reader.fieldnames = _distinct(reader.fieldnames or ())
        columns |= dict.fromkeys(reader.fieldnames)
        line = reader.line_num + 1
        try:
            for row in reader:
                if None in row:  # for example, a caption with a comma and without quotes
                    yield line, UnreadableRow(f"more fields than columns: {list(row.values())!r:.160}")
                else:
                    yield line, row
                line = reader.line_num + 1  # a field may span several lines
        except csv.Error as error:
            raise csv.Error(f"line {reader.reader.line_num}: {error}") from error


def _read_jsonl(path: Path, needed: Iterable[str], columns: dict[str, None]) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line, object_pairs_hook=_object)
            except RepeatedColumn as error:
                yield number, UnreadableRow(f"{error}: {line.strip()!r:.160}")
            except (ValueError, RecursionError):  # a syntax error, thousands of digits, or thousands of brackets
                yield number, UnreadableRow(f"not JSON: {line.strip()!r:.160}")


def _read_parquet(path: Path, needed: Iterable[str], columns: dict[str, None]) -> Iterator[tuple[int, Any]]:
    with pq.ParquetFile(path) as file:
        stored = dict(zip(_distinct(file.schema_arrow.names), file.schema_arrow.names, strict=True))
        columns |= dict.fromkeys(stored)
        present = {stored[name]: name for name in needed if name in stored}
        batches = file.iter_batches(BATCH_ROWS, columns=list(present))
        rows = (row for batch in batches for row in batch.to_pylist())
        yield from enumerate(({name: row[column] for column, name in present.items()} for row in rows), 1)


READERS = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
SUFFIXES = tuple(READERS)
