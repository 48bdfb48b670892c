"""Read metadata files: a row for each video, in CSV, JSON lines or Parquet."""

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

LONGEST_FIELD = 16 * 1024 * 1024  # characters of a CSV file's field; Python's own limit ends the whole file at 128 Ki
ROWS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class Row:
    """A row, by its line (of Parquet, its number from 1), and what it has in the two columns, whatever that is."""

    number: int
    file: Any
    caption: Any
    shown: str  # its beginning, where it names no file


class Unusable(str):
    """What is wrong with a row that could not be taken apart."""

    __slots__ = ()


def read_rows(path: Path, file_column: str, caption_column: str) -> Iterator[Row]:
    """The rows of a metadata file.

    Raises:
        ManifestError: it cannot be read, or not one row has such a column.
    """
    columns: dict[str, None] = {}
    try:
        for number, row in READERS[path.suffix.lower()](path, (file_column, caption_column), columns):
            values = row if isinstance(row, Mapping) else {}
            columns |= dict.fromkeys(map(str, values))
            file = values.get(file_column)
            yield Row(number, file, values.get(caption_column), "" if isinstance(file, str) else _shown(row))
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        raise ManifestError(f"{path} cannot be read: {error}") from error
    for column in (file_column, caption_column):
        if column not in columns:
            raise ManifestError(f"{path} has no column {column!r}; it has {join_names(columns) or 'none'}")


def _shown(row: Any) -> str:
    return row if isinstance(row, Unusable) else f"{row!r:.200}"


def _csv(path: Path, wanted: Iterable[str], columns: dict[str, None]) -> Iterator[tuple[int, Any]]:
    """Strictly: a quote that is never closed would otherwise swallow all rows after it."""
    csv.field_size_limit(LONGEST_FIELD)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        columns |= dict.fromkeys(reader.fieldnames or ())
        line = reader.line_num + 1
        try:
            for row in reader:  # more fields than columns: a comma in a caption without quotes, say
                yield line, Unusable(f"more fields than columns: {list(row.values())!r:.160}") if None in row else row
                line = reader.line_num + 1  # a field may go over several
        except csv.Error as error:
            raise csv.Error(f"line {reader.reader.line_num}: {error}") from error


def _jsonl(path: Path, wanted: Iterable[str], columns: dict[str, None]) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        yield from ((number, _json(line)) for number, line in enumerate(file, 1) if line.strip())


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # an ordinary fault, a number of thousands of digits, a thousand brackets
        return Unusable(f"no JSON: {line.strip()!r:.160}")


def _parquet(path: Path, wanted: Iterable[str], columns: dict[str, None]) -> Iterator[tuple[int, Any]]:
    with pq.ParquetFile(path) as file:
        columns |= dict.fromkeys(file.schema_arrow.names)
        present = [name for name in wanted if name in columns]
        batches = file.iter_batches(ROWS_AT_ONCE, columns=present)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)


READERS = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}
SUFFIXES = tuple(READERS)
