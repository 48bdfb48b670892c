"""Show the numbers of one run or two: as lines of a terminal, and as JSON."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from pusa.evaluate.runs import CHANGE, KNOWN, LABELS, Comparison, Line, Row
from pusa.evaluate.thresholds import Outcome
from pusa.system.text import MAX_LISTED, join_names, printable

GAP = "  "
BLANK = ""
Cells = list[str]


def shown_value(value: float | None, side: int) -> str:
    """Return a number with 4 digits; a change with its sign; "" for None."""
    if value is None:
        return BLANK
    return f"{value:+.4g}" if side == CHANGE else f"{value:.4g}"


def table_lines(comparison: Comparison, width: int | None = None) -> list[str]:
    """Return a table: a line for each job, of two runs three, and at its end the means and the worst values.

    Args:
        comparison: the jobs.
        width: of the terminal, in characters: more columns than it has room for follow below, in a table of their own.
            None for one table, however wide.
    """
    heads, rows = _grid(comparison)
    fixed = len(heads) - len(comparison.columns)
    columns = [[head, *cells] for head, *cells in zip(heads, *rows, strict=True)]
    sizes = [max(len(word) for word in [*head.split(" "), *cells]) for head, *cells in columns]
    blocks: list[list[int]] = [[]]
    used = room = sum(sizes[:fixed]) + len(GAP) * (fixed - 1)
    for place in range(fixed, len(columns)):
        used += len(GAP) + sizes[place]
        if width and used > width and blocks[-1]:
            blocks.append([])
            used = room + len(GAP) + sizes[place]
        blocks[-1].append(place)
    lines: list[str] = []
    for block in blocks:
        places = [*range(fixed), *block]
        lines += [BLANK] * bool(lines) + list(
            _block([columns[place] for place in places], [sizes[p] for p in places], fixed)
        )
    return lines


def _block(columns: Sequence[Cells], sizes: Sequence[int], fixed: int) -> Iterator[str]:
    """Yield the lines of a table whose heads have a line for each word; the first columns are aligned to the left."""
    heads = [column[0].split(" ") for column in columns]
    height = max(map(len, heads))
    above = [[BLANK] * (height - len(head)) + head for head in heads]
    for cells in [*zip(*above, strict=True), *zip(*(column[1:] for column in columns), strict=True)]:
        sized = [
            cell.ljust(size) if place < fixed else cell.rjust(size)
            for place, (cell, size) in enumerate(zip(cells, sizes, strict=True))
        ]
        yield GAP.join(sized).rstrip()


def _grid(comparison: Comparison) -> tuple[Cells, list[Cells]]:
    """Return the heads and all rows as texts."""
    sides, several = range(len(comparison.labels)), len(comparison.runs) > 1

    def row(title: str, side: int, state: str, value: Callable[[str], float | None]) -> Cells:
        label = [comparison.labels[side]] * several
        return [title, *label, state, *(shown_value(value(name), side) for name in comparison.columns)]

    rows = [
        row(line.id if side == 0 else BLANK, side, job_state(line, side), line.sides[side].get)
        for line in comparison.lines
        for side in sides
    ]
    rows += [row("mean", side, BLANK, lambda name, side=side: comparison.mean(side, name)) for side in sides]  # type: ignore[misc]
    rows += [row("worst", side, BLANK, lambda name, side=side: _worst(comparison, side, name)) for side in sides]  # type: ignore[misc]
    return ["job", *["run"] * several, "state", *(name.replace("_", " ") for name in comparison.columns)], rows


def _worst(comparison: Comparison, side: int, name: str) -> float | None:
    worst = comparison.worst(side, name)
    return worst[1] if worst else None


def job_state(line: Line, side: int) -> str:
    """Return the state of a job in a run, "absent" if the run does not have it; "" of the change between two."""
    if side == CHANGE:
        return BLANK
    row = line.rows[side]
    return row.state if row else "absent"


def notes(comparison: Comparison) -> list[str]:
    """Return what is to be said beside the table: which runs, why jobs have no number, which jobs one run lacks."""
    lines = []
    if len(comparison.runs) > 1:
        names = [f"{label}: {printable(run)}" for label, run in zip(comparison.labels, comparison.runs, strict=False)]
        lines += [*names, "change: second - first"]
    for run, ids in comparison.missing():
        lines.append(f"{len(ids):,} not in the {run} run: {join_names(ids)}")
    rows = [row for line in comparison.lines for row in line.rows if row]
    several = len(comparison.runs) > 1
    reasons = [
        f"{label} run: " * several + f"{row.id} ({row.state}): {row.why}"
        for line in comparison.lines
        for label, row in zip(LABELS, line.rows, strict=False)
        if row and row.why
    ]
    lines += reasons[:MAX_LISTED] + [f"and {len(reasons) - MAX_LISTED:,} more"] * (len(reasons) > MAX_LISTED)
    if old := [row.id for row in rows if row.unmeasured]:
        lines.append(f"{len(old):,} of an earlier version, whose records have no numbers: {join_names(old)}")
    if odd := [row.id for row in rows if row.unusable]:
        lines.append(f"{len(odd):,} with values in their records that are not numbers: {join_names(odd)}")
    return lines


def as_json(comparison: Comparison, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return everything as JSON values; the numbers are those of the columns."""
    labels, columns = comparison.labels, comparison.columns
    sides = [(side, label) for side, label in enumerate(labels)]
    return {
        "runs": {label: printable(run) for label, run in zip(labels, comparison.runs, strict=False)},
        "numbers": {name: asdict(KNOWN[name]) for name in columns},
        "jobs": [_job(line, comparison) for line in comparison.lines],
        "mean": {label: {name: comparison.mean(side, name) for name in columns} for side, label in sides},
        "worst": {
            label: {
                name: dict(zip(("id", "value"), worst, strict=True))
                for name in columns
                if (worst := comparison.worst(side, name))
            }
            for side, label in sides
        },
        "requirements": [outcome.as_json() for outcome in outcomes],
    }


def _job(line: Line, comparison: Comparison) -> dict[str, Any]:
    known, job = line.known, {}
    for label, row in zip(LABELS, line.rows, strict=False):
        job[label] = _row(row, comparison.columns) if row else None
    if len(comparison.runs) > 1:
        job[LABELS[CHANGE]] = {
            name: line.sides[CHANGE][name] for name in comparison.columns if name in line.sides[CHANGE]
        }
    return {"id": line.id, "task": known.task, "prompt": printable(known.prompt), "seed": known.seed, **job}


def _row(row: Row, columns: Sequence[str]) -> dict[str, Any]:
    facts = {"state": row.state, "why": row.why or None, "unmeasured": row.unmeasured, "unusable": list(row.unusable)}
    return {**facts, "numbers": {name: row.numbers[name] for name in columns if name in row.numbers}, **row.stretches}
