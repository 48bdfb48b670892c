"""Format numbers, counts and tables for people."""

from collections.abc import Iterable, Mapping, Sequence

from pusa.system.text import printable

BYTE_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def format_counts(counts: Mapping[str, int], longest: int = 6) -> str:
    """Return the most frequent names with their counts, and the number of the others: "a (3), b (2), 4 others"."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{printable(name)} ({count:,})" for name, count in ranked[:longest]]
    if len(ranked) > longest:
        parts.append(f"{len(ranked) - longest:,} others")
    return ", ".join(parts) or "none"


def format_bytes(count: float) -> str:
    """Return a number of bytes in a fitting unit."""
    power = 0
    while count >= 1024 and power < len(BYTE_UNITS) - 1:
        count, power = count / 1024, power + 1
    return f"{count:.3g} {BYTE_UNITS[power]}" if power else f"{count:.0f} bytes"


def format_hours(hours: float) -> str:
    """Return a duration in a fitting unit."""
    for unit, per_hour in (("hours", 1), ("minutes", 60)):
        if hours * per_hour >= 1:
            return f"{hours * per_hour:,.1f} {unit}"
    return f"{hours * 3600:.1f} seconds"


def format_decibels(value: float | None) -> str:
    """Return a PSNR in decibels, or "-" for None."""
    return "-" if value is None else f"{value:.1f} dB"


def format_range(low: float | None, high: float | None) -> str:
    """Return a range, or "-" if an end is None."""
    return "-" if low is None or high is None else f"{format_number(low)} .. {format_number(high)}"


def format_number(value: float | None) -> str:
    """Return a number with a few digits, or "-" for None."""
    if value is None:
        return "-"
    return f"{value:.2f}" if abs(value) < 1e6 else f"{value:.2e}"


def format_optional_count(value: int | None) -> str:
    """Return a count, or "not recorded" for None."""
    return "not recorded" if value is None else f"{value:,}"


def format_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return lines of text in columns, each as wide as its widest cell."""
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in padded)
