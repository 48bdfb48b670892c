"""Numbers as words."""

from collections.abc import Iterable, Mapping, Sequence

from pusa.words import plain

UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def counted(counts: Mapping[str, int], most: int = 6) -> str:
    """How often each, the most frequent first: "a (3), b (2)", and how many others there are."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    told = [f"{plain(name)} ({count:,})" for name, count in ranked[:most]]
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
