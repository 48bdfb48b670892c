"""Read metadata files: one row for each video, in CSV, JSON lines or Parquet."""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pusa.errors import ManifestError
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


class UnreadableRow(str):
    """A row that could not be parsed; the text is the reason."""

    __slots__ = ()


def read_rows(path: Path, file_column: str, caption_column: str) -> Iterator[Row]:
    """Yield the rows of a metadata file.

    Raises:
        ManifestError: the file cannot be read, or no row has one of the columns.
    """
    columns: dict[str, None] = {}
    try:
        for number, row in READERS[path.suffix.lower()](path, (file_column, caption_column), columns):
            values = row if isinstance(row, Mapping) else {}
            columns |= dict.fromkeys(map(str, values))
            file, preview = values.get(file_column), ""
            if not isinstance(file, str):
                preview = row if isinstance(row, UnreadableRow) else f"{row!r:.200}"
            yield Row(number, file, values.get(caption_column), preview)
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        raise ManifestError(f"{path} cannot be read: {error}") from error
    for column in (file_column, caption_column):
        if column not in columns:
            raise ManifestError(f"{path} has no column {column!r}; it has {join_names(columns) or 'none'}")


# Each reader yields (number, row) and adds the names of the columns that it sees to `columns`. `needed` are the columns
# that will be used.


def _read_csv(path: Path, needed: Iterable[str], columns: dict[str, None]) -> Iterator[tuple[int, Any]]:
    """Read CSV strictly. Otherwise a quote that is never closed would swallow all rows after it."""
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        columns |= dict.fromkeys(reader.fieldnames or ())
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
                yield number, json.loads(line)
            except (ValueError, RecursionError):  # a syntax error, thousands of digits, or thousands of brackets
                yield number, UnreadableRow(f"not JSON: {line.strip()!r:.160}")


def _read_parquet(path: Path, needed: Iterable[str], columns: dict[str, None]) -> Iterator[tuple[int, Any]]:
    with pq.ParquetFile(path) as file:
        columns |= dict.fromkeys(file.schema_arrow.names)
        present = [name for name in needed if name in columns]
        batches = file.iter_batches(BATCH_ROWS, columns=present)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)


READERS = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
SUFFIXES = tuple(READERS)
