"""A table in numbers: one JSON object for programs, and lines for people."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pusa.data.reader import Table
from pusa.inspect.facts import read_part
from pusa.system.text import printable

UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def counted(counts: Mapping[str, int], most: int = 6) -> str:
    """How often each, the most frequent first: "a (3), b (2)", and how many others there are."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    told = [f"{printable(name)} ({count:,})" for name, count in ranked[:most]]
    return ", ".join(told + [f"{len(ranked) - most:,} others"] * (len(ranked) > most)) or "none"


def size(count: float) -> str:
    """A number of bytes in the unit that suits it."""
    power = 0
    while count >= 1024 and power < len(UNITS) - 1:
        count, power = count / 1024, power + 1
    return f"{count:.3g} {UNITS[power]}" if power else f"{count:.0f} bytes"


def lasting(hours: float) -> str:
    """A time in the unit that suits it."""
    for unit, part in (("hours", 1), ("minutes", 60)):
        if hours * part >= 1:
            return f"{hours * part:,.1f} {unit}"
    return f"{hours * 3600:.1f} seconds"


def decibels(value: float | None) -> str:
    """A PSNR, if there is one."""
    return "-" if value is None else f"{value:.1f} dB"


def between(low: float | None, high: float | None) -> str:
    """A range, if there is one."""
    return "-" if low is None or high is None else f"{short(low)} .. {short(high)}"


def short(value: float | None) -> str:
    """A number in a few digits, if there is one."""
    if value is None:
        return "-"
    return f"{value:.2f}" if abs(value) < 1e6 else f"{value:.2e}"


def columns(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of which every column is as wide as its widest cell."""
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in padded)


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` of `count` places, or all of them, the first and the last among them, evenly apart."""
    if wanted >= count:
        return list(range(count))
    return [round(i * (count - 1) / max(1, wanted - 1)) for i in range(wanted)]


FIRST_REJECTS = 3  # of each reason
Reject = dict[str, str]  # source, reason, detail


@dataclass(frozen=True)
class Summary:
    """What a table holds. `lines` are pairs of what is told and its value."""

    title: str
    numbers: dict[str, Any]
    lines: list[tuple[str, str]]
    rejects: list[Reject]

    def text(self) -> str:
        """For a terminal; of the rejects the first few of each reason."""
        width = max(len(name) for name, _ in self.lines) + 2
        told = [f"  {name:<{width}}{value}" for name, value in self.lines]
        return "\n".join([self.title, *told, *self._told_rejects()])

    def _told_rejects(self) -> list[str]:
        lines = []
        for reason, count in self.numbers["rejects_by_reason"].items():
            some = [reject for reject in self.rejects if reject["reason"] == reason][:FIRST_REJECTS]
            lines.append(f"  rejected, {reason}: {count:,}")
            lines += [f"    {_told(reject)}" for reject in some]
            lines += [f"    and {count - len(some):,} more"] * (count > len(some))
        return lines


def _told(reject: Reject) -> str:
    """Its path and its sentence, which may name the path already."""
    detail = printable(reject["detail"])
    return detail if reject["source"] in reject["detail"] else f"{printable(reject['source'])}: {detail}"


def rejects_of(table: Table) -> list[Reject]:
    """All rejects of a table."""
    return read_part(table, "rejects").to_pylist()


def by_reason(rejects: Sequence[Reject]) -> dict[str, int]:
    """How many there are of each reason, the most frequent first."""
    return dict(Counter(reject["reason"] for reject in rejects).most_common())


def tally(column: pa.ChunkedArray) -> dict[str, int]:
    """How often each value occurs, by name; numbers as short as they can be told."""
    counts = pc.value_counts(column).to_pylist()
    names = ((item["values"], item["counts"]) for item in counts)
    return {f"{value:.6g}" if isinstance(value, float) else str(value): count for value, count in sorted(names)}


def hours(rows: pa.Table) -> float:
    """How long clips are together. The number of frames is the last part of a bucket's name."""
    rows = rows.filter(pc.greater(rows["fps"], 0))  # imported ones may not know it
    shapes = rows.group_by(["bucket", "fps"]).aggregate([([], "count_all")]).to_pylist()
    seconds = sum(int(s["bucket"].rpartition("x")[2]) / s["fps"] * s["count_all"] for s in shapes)
    return seconds / 3600
