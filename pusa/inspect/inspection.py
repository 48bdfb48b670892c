"""Inspect a table of clips or latents: numbers, decoded rows, and a contact sheet."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pusa.data.reader import Table
from pusa.data.schema import KEY_COLUMNS
from pusa.data.writer import INDEX
from pusa.errors import PartlyFailed, TableError
from pusa.inspect.clips import summarize_clips
from pusa.inspect.facts import drop_unreadable
from pusa.inspect.latents import summarize_latents
from pusa.inspect.page import LONGEST, Html, page, pairs, paragraph
from pusa.inspect.sheet import MAX_ROWS, clips_section, decoded_section, reject_sections
from pusa.inspect.summary import Summary
from pusa.system.files import write_text
from pusa.system.text import join_lines

if TYPE_CHECKING:
    from pusa.inspect.decode import DecodedRow

PAGE_START = b'<!doctype html>\n<html lang="en"><head>'  # of every page that was ever written
TABLES = ("clips", "latents")  # in a run's folder


@dataclass(frozen=True)
class Inspection:
    """The result of an inspection, without the shards that cannot be read: `unreadable` says which, and why.

    `decoded` is None if no rows were to be decoded.
    """

    table: Table
    summary: Summary
    decoded: list["DecodedRow"] | None = None
    unreadable: Sequence[str] = ()

    def json(self) -> dict[str, Any]:
        """Return a JSON object; numbers that are not finite become None, since JSON cannot represent them."""
        decoded = {} if self.decoded is None else {"decoded": [row.json() for row in self.decoded]}
        numbers = {**self.summary.numbers, **decoded, "unreadable": list(self.unreadable)}
        return {key: _replace_not_finite(value) for key, value in numbers.items()}

    def text(self) -> str:
        """Return the summary and the decoded rows for a terminal."""
        if self.decoded is None:
            return self.summary.text()
        from pusa.inspect.decode import format_decoded

        return f"{self.summary.text()}\n\n{format_decoded(self.decoded)}"

    def require_readable(self) -> None:
        """Raise PartlyFailed if shards or rows could not be read. The report shows all the others."""
        unreadable = [*self.unreadable, *(row.note for row in self.decoded or () if row.is_unreadable)]
        if unreadable:
            raise PartlyFailed(
                join_lines(f"{self.table.folder} is damaged, and what is reported above lacks:", unreadable)
            )

    def write(self, path: Path, limit: int) -> None:
        """Write the contact sheet atomically, with pictures of at most `limit` rows.

        Raises:
            TableError: the file could not be written; for one, the table is another user's.
        """
        part = row_part(self.table)
        if self.decoded is None:
            pictures = clips_section(self.table, part, limit)
        else:
            pictures = decoded_section(self.decoded, self.table.rows(part))
        damage = [paragraph(reason, bad=True, longest=LONGEST) for reason in self.unreadable[:MAX_ROWS]]
        parts: list[Html] = [*damage, pairs(self.summary.lines), pictures, *reject_sections(self.summary)]
        try:
            write_text(path, page(self.summary.title, parts))
        except OSError as error:
            raise TableError(
                f"{path} cannot be written ({error.strerror}); name another file with --html, or use --json"
            ) from error


def require_page(path: Path) -> None:
    """Refuse to replace a file that is not a page.

    Raises:
        TableError: it is not.
    """
    if path.exists() and not (path.is_file() and _begins_as_page(path)):
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
        TableError: the folder is not a table, the table is incomplete or of another version, its index is damaged, or
            it has no latents to decode.
    """
    table, unreadable = open_table(folder), list[str]()
    is_clips = row_part(table) == "clips"
    if is_clips and decode:
        raise TableError(f"{folder} holds clips, not latents; there is nothing to decode")
    summarize = summarize_clips if is_clips else summarize_latents
    try:
        summary = summarize(table)
    except TableError:
        readable, unreadable = drop_unreadable(table)
        if not unreadable:
            raise
        # Rows name the shards of arrays by their number, so these stay for the decoding.
        table = replace(
            readable,
            parts={**readable.parts, **{part: table.parts[part] for part in KEY_COLUMNS if part in table.parts}},
        )
        summary = summarize(readable)
    if not decode:
        return Inspection(table, summary, unreadable=unreadable)
    from pusa.inspect.decode import decode_rows

    return Inspection(table, summary, decode_rows(table, decode, weights), unreadable)


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
