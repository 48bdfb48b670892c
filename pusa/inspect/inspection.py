"""Look into a table of clips or latents."""

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
from pusa.inspect.sheet import clips_sheet, decoded_sheet, endings
from pusa.inspect.summary import Summary
from pusa.system.files import write_text

if TYPE_CHECKING:
    from pusa.inspect.decode import Decoded

TABLES = ("clips", "latents")  # in a run's folder


@dataclass(frozen=True)
class Inspection:
    """What was seen. `decoded` is None where none was asked for."""

    table: Table
    summary: Summary
    decoded: list["Decoded"] | None = None

    def json(self) -> dict[str, Any]:
        """One object; where a number is not finite, for which JSON has no word, None."""
        decoded = {} if self.decoded is None else {"decoded": [row.json() for row in self.decoded]}
        told: dict[str, Any] = _finite(self.summary.numbers | decoded)
        return told

    def text(self) -> str:
        """For a terminal."""
        if self.decoded is None:
            return self.summary.text()
        from pusa.inspect.decode import told

        return f"{self.summary.text()}\n\n{told(self.decoded)}"

    def write(self, path: Path, limit: int) -> None:
        """Write the contact sheet, atomically; pictures of `limit` rows at most.

        Raises:
            OSError: it could not be written.
        """
        part = row_part(self.table)
        if self.decoded is None:
            sheet = clips_sheet(self.table, part, limit)
        else:
            sheet = decoded_sheet(self.decoded, self.table.rows(part))
        parts: list[Html] = [pairs(self.summary.lines), sheet, *endings(self.summary)]
        write_text(path, page(self.summary.title, parts))


def inspect(folder: Path, decode: int = 0, weights: str | None = None) -> Inspection:
    """Count what a table holds, and decode some of its rows.

    Args:
        folder: the table.
        decode: of a latents table, how many rows to decode; 0 is none.
        weights: the model to decode with, instead of the recorded one.

    Raises:
        TableError: it is no table, not complete, damaged or of another version, or it holds no latents to decode.
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
    """The table in a folder.

    Raises:
        TableError: as `Table.open`; or it is the folder of a run, whose tables lie in it.
    """
    inner = [str(folder / name) for name in TABLES if (folder / name / INDEX).is_file()]
    if inner and not (folder / INDEX).is_file():
        raise TableError(f"{folder} is the folder of a run; inspect {' or '.join(inner)}")
    if not folder.is_dir():
        raise TableError(f"{folder} is no folder; expected is a table, such as RUN/clips or RUN/latents")
    return Table.open(folder)


def row_part(table: Table) -> str:
    """The part with a row for each clip: "clips" of a clips table, "rows" of a latents table.

    Raises:
        TableError: it has neither.
    """
    for part in ("clips", "rows"):
        if part in table.parts:
            return part
    raise TableError(f"{table.folder} has the parts {', '.join(table.parts)}; expected are clips or rows")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
