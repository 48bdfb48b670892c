"""Summarize a table in numbers: as a JSON object for programs, and as lines of text for people."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pusa.data.reader import Table
from pusa.system.text import printable

REJECTS_SHOWN = 3  # of each reason
Reject = dict[str, str]  # source, reason, detail


@dataclass(frozen=True)
class Summary:
    """The content of a table. `lines` are pairs of a label and its text."""

    title: str
    numbers: dict[str, Any]
    lines: list[tuple[str, str]]
    rejects: list[Reject]

    def text(self) -> str:
        """Return the summary for a terminal, with the first few rejects of each reason."""
        width = max(len(label) for label, _ in self.lines) + 2
        output = [self.title, *(f"  {label:<{width}}{value}" for label, value in self.lines)]
        for reason, count in self.numbers["rejects_by_reason"].items():
            first = [reject for reject in self.rejects if reject["reason"] == reason][:REJECTS_SHOWN]
            output.append(f"  rejected, {reason}: {count:,}")
            for reject in first:
                source, detail = printable(reject["source"]), printable(reject["detail"])
                # Many details name the source already.
                output.append(f"    {detail}" if reject["source"] in reject["detail"] else f"    {source}: {detail}")
            if count > len(first):
                output.append(f"    and {count - len(first):,} more")
        return "\n".join(output)


def read_rejects(table: Table) -> list[Reject]:
    """Read all rejects of a table."""
    return table.read("rejects").to_pylist()


def count_reasons(rejects: Sequence[Reject]) -> dict[str, int]:
    """Return the number of rejects of each reason, the most frequent first."""
    return dict(Counter(reject["reason"] for reject in rejects).most_common())


def count_values(column: pa.ChunkedArray) -> dict[str, int]:
    """Return how often each value of a column occurs, by its text; numbers have up to six digits."""
    counts = pc.value_counts(column).to_pylist()
    items = ((item["values"], item["counts"]) for item in counts)
    return {f"{value:.6g}" if isinstance(value, float) else str(value): count for value, count in sorted(items)}


def total_hours(rows: pa.Table) -> float:
    """Return the length of all clips in hours. The number of frames is the last part of a bucket's name."""
    rows = rows.filter(pc.greater(rows["fps"], 0))  # imported clips may have an unknown rate
    groups = rows.group_by(["bucket", "fps"]).aggregate([([], "count_all")]).to_pylist()
    seconds = sum(int(g["bucket"].rpartition("x")[2]) / g["fps"] * g["count_all"] for g in groups)
    return seconds / 3600
