"""Inspect a table of clips or latents: numbers, decoded rows, and a contact sheet."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pusa.data.reader import Table
from pusa.data.writer import INDEX
from pusa.errors import TableError
from pusa.inspect.clips import summarize_clips
from pusa.inspect.latents import summarize_latents
from pusa.inspect.page import Html, page, pairs
from pusa.inspect.sheet import clips_section, decoded_section, reject_sections
from pusa.inspect.summary import Summary
from pusa.system.files import write_text

if TYPE_CHECKING:
    from pusa.inspect.decode import DecodedRow

PAGE_START = b'<!doctype html>\n<html lang="en"><head>'  # of every page that was ever written
TABLES = ("clips", "latents")  # in a run's folder


@dataclass(frozen=True)
class Inspection:
    """The result of an inspection. `decoded` is None if no rows were to be decoded."""

    table: Table
    summary: Summary
    decoded: list["DecodedRow"] | None = None

    def json(self) -> dict[str, Any]:
        """Return a JSON object; numbers that are not finite become None, since JSON cannot represent them."""
        decoded = {} if self.decoded is None else {"decoded": [row.json() for row in self.decoded]}
        return {key: _replace_not_finite(value) for key, value in (self.summary.numbers | decoded).items()}

    def text(self) -> str:
        """Return the summary and the decoded rows for a terminal."""
        if self.decoded is None:
            return self.summary.text()
        from pusa.inspect.decode import format_decoded

        return f"{self.summary.text()}\n\n{format_decoded(self.decoded)}"

    def write(self, path: Path, limit: int) -> None:
        """Write the contact sheet atomically, with pictures of at most `limit` rows.

        Raises:
            OSError: the file could not be written.
        """
        part = row_part(self.table)
        if self.decoded is None:
            pictures = clips_section(self.table, part, limit)
        else:
            pictures = decoded_section(self.decoded, self.table.rows(part))
        parts: list[Html] = [pairs(self.summary.lines), pictures, *reject_sections(self.summary)]
        write_text(path, page(self.summary.title, parts))


def require_page(path: Path) -> None:
    """Refuse to replace a file that is not a page.

    Raises:
        TableError: it is not.
    """
    if path.is_dir() or (path.is_file() and not _begins_as_page(path)):
        raise TableError(f"{path} exists and is not a page of `pusa inspect`; name another file")


def _begins_as_page(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(PAGE_START)) == PAGE_START


def inspect(folder: Path, decode: int = 0, weights: str | None = None) -> Inspection:
    """Summarize a table, and decode some of its rows.

    Args:
        folder: the table's folder.
        decode: how many rows of a latents table to decode.
        weights: the model to decode with, instead of the recorded one.

    Raises:
        TableError: the folder is not a table, the table is incomplete, damaged or of another version, or it has no
            latents to decode.
    """
    table = open_table(folder)
    if row_part(table) == "clips":
        if decode:
            raise TableError(f"{folder} holds clips, not latents; there is nothing to decode")
        return Inspection(table, summarize_clips(table))
    summary = summarize_latents(table)
    if not decode:
        return Inspection(table, summary)
    from pusa.inspect.decode import decode_rows

    return Inspection(table, summary, decode_rows(table, decode, weights))


def open_table(folder: Path) -> Table:
    """Open the table in a folder.

    Raises:
        TableError: as `Table.open`; or the folder is that of a run, which contains the tables.
    """
    inner = [str(folder / name) for name in TABLES if (folder / name / INDEX).is_file()]
    if inner and not (folder / INDEX).is_file():
        raise TableError(f"{folder} is the folder of a run; inspect {' or '.join(inner)}")
    if not folder.is_dir():
        raise TableError(f"{folder} is not a folder; expected a table, such as RUN/clips or RUN/latents")
    return Table.open(folder)


def row_part(table: Table) -> str:
    """Return the part with one row for each clip: "clips" of a clips table, "rows" of a latents table.

    Raises:
        TableError: the table has neither.
    """
    for part in ("clips", "rows"):
        if part in table.parts:
            return part
    raise TableError(f"{table.folder} has the parts {', '.join(table.parts)}; expected clips or rows")


def _replace_not_finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _replace_not_finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_replace_not_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
