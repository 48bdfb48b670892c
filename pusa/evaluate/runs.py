"""Read the numbers of a run's videos off its records, and put two runs side by side. Nothing is written.

A run may be another person's, and may be made meanwhile: what has another type than Pusa writes counts as unusable, and
a link that leads out of the run is not followed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from pusa.generate.cards import Files, card_of, is_number, read_facts
from pusa.generate.listed import shown_ids
from pusa.generate.numbers import NUMBERS, STRETCHES, Number
from pusa.generate.outputs import PREVIEW, PREVIEWS, RECORD, VIDEO
from pusa.system.failures import Failure
from pusa.system.text import printable

MOTION_SHARE, MOTION, FREE_TASK = "motion_share", "motion", "text_to_video"
ALIKE = ("prompt", "seed", "width", "height", "num_frames", "steps")  # settings of videos whose motions are compared
KNOWN: Mapping[str, Number] = {
    **NUMBERS,
    MOTION_SHARE: Number(
        f"motion, as a share of that of the {FREE_TASK} of the same {', '.join(ALIKE)}, in this run or the other",
        "",
        "high",
    ),
}
MOST_STRETCHES = 20  # of each kind
LABELS = ("first", "second", "change")  # the runs, and what the second one adds to the first
CHANGE = LABELS.index("change")


@dataclass(frozen=True)
class Row:
    """A job of a run. Its texts are safe to print, but for the prompt.

    Attributes:
        id: the job's id.
        state: a state of the gallery: done, draft, failed, waiting.
        why: the reason for a missing video or number, else "".
        task, prompt, seed: of its settings, as texts.
        numbers: what is known of its video, by the names of `KNOWN`.
        stretches: black and frozen stretches, [first frame, last frame] each.
        unusable: the names of numbers whose values are none.
        unmeasured: whether its record is of an earlier version, without numbers.
        video, picture: its files, if there are.
        alike: its values of `ALIKE`; None if one is missing.
    """

    id: str
    state: str
    why: str = ""
    task: str = ""
    prompt: str = ""
    seed: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)
    stretches: Mapping[str, list[list[int]]] = field(default_factory=dict)
    unusable: tuple[str, ...] = ()
    unmeasured: bool = False
    video: Path | None = None
    picture: Path | None = None
    alike: tuple[str | int, ...] | None = None

    @property
    def is_made(self) -> bool:
        """Return whether its video is there, as its settings are now."""
        return self.state == "done"


@dataclass(frozen=True)
class Line:
    """A job in one run or in two: its row in each, None where a run does not have it."""

    id: str
    rows: tuple[Row | None, ...]

    @cached_property
    def sides(self) -> list[Mapping[str, float]]:
        """Return its numbers in each run, and of two runs the second's minus the first's."""
        numbers = [row.numbers if row else {} for row in self.rows]
        if len(numbers) < 2:
            return numbers
        first, second = numbers
        return [*numbers, {name: second[name] - first[name] for name in first if name in second}]

    @property
    def known(self) -> Row:
        """Return its row in the last run that has it."""
        return next(row for row in reversed(self.rows) if row)


@dataclass(frozen=True)
class Comparison:
    """The jobs of one run or of two, and the columns that are shown."""

    runs: tuple[Path, ...]
    lines: Sequence[Line]
    columns: Sequence[str]

    @property
    def labels(self) -> tuple[str, ...]:
        """Return what the sides of a line are called."""
        return LABELS if len(self.runs) > 1 else LABELS[:1]

    def values(self, side: int, name: str) -> dict[str, float]:
        """Return a number of the jobs that have it, by id, on a side of their lines."""
        return {line.id: line.sides[side][name] for line in self.lines if name in line.sides[side]}

    def mean(self, side: int, name: str) -> float | None:
        """Return the mean of a number over the jobs that have it; None if no job has it."""
        values = self.values(side, name)
        return fmean(values.values()) if values else None

    def worst(self, side: int, name: str) -> tuple[str, float] | None:
        """Return the job with the worst value, and the value; None if there is none, or no value is better."""
        better, values = KNOWN[name].better, self.values(side, name)
        if not values or better is None:
            return None
        id = (min if better == "high" else max)(values, key=values.__getitem__)
        return id, values[id]

    def sorted_by(self, name: str) -> "Comparison":
        """Return it with the worst jobs first; of two runs, those that became worst.

        Where neither more nor less is better, the largest values or changes are first. Jobs without one are last.
        """
        values, better = self.values(len(self.labels) - 1, name), KNOWN[name].better
        size: Callable[[float], float] = abs if better is None else float
        sign = 1 if better == "high" else -1
        return replace(
            self,
            lines=sorted(self.lines, key=lambda line: (line.id not in values, sign * size(values.get(line.id, 0.0)))),
        )

    def missing(self) -> Iterator[tuple[str, list[str]]]:
        """Yield which run lacks jobs that the other one has, and their ids."""
        for side, label in enumerate(self.labels[: len(self.runs)]):
            if ids := [line.id for line in self.lines if line.rows[side] is None]:
                yield label, ids


def compare_runs(runs: Sequence[Path], columns: Sequence[str] = (), measure: bool = False) -> Comparison:
    """Read one run, or two, and return their jobs: those of the first run in order, then what only the second has.

    Args:
        runs: the folders of the runs.
        columns: names of `KNOWN` to show; by default those that a job has.
        measure: whether to measure videos whose records have no numbers.

    Raises:
        ManifestError: a folder has no jobs.
        MediaError: the list of a run's jobs is damaged.
    """
    tables = [read_run(run, measure) for run in runs]
    motions = [_free_motions(table) for table in tables]
    for place, table in enumerate(tables):
        free = {**motions[1 - place], **motions[place]} if len(tables) > 1 else motions[place]
        for id, row in table.items():
            table[id] = _with_share(row, free)
    ids = list(dict.fromkeys(id for table in tables for id in table))
    lines = [Line(id, tuple(table.get(id) for table in tables)) for id in ids]
    there = {name for line in lines for side in line.sides for name in side}
    return Comparison(tuple(runs), lines, columns or [name for name in KNOWN if name in there])


def read_run(run: Path, measure: bool = False) -> dict[str, Row]:
    """Return the jobs of a run by id, in order. Arguments and errors: as `compare_runs`."""
    folder, ids = run / "videos", shown_ids(run)
    files, home = Files(folder), folder.resolve()
    rows = {id: _read_row(id, files, home) for id in ids}
    if measure:
        from pusa.evaluate.reading import measure_video, read_videos

        found = read_videos(
            measure_video, [row.video for row in rows.values() if row.unmeasured and row.video], "measured"
        )
        rows |= {id: _with_measured(row, found[row.video]) for id, row in rows.items() if row.video in found}
    return rows


def _with_measured(row: Row, found: Mapping[str, Any] | Failure) -> Row:
    """Return a row with the numbers that were found, or why there are none."""
    if isinstance(found, Failure):
        return replace(row, why=printable(found.message))
    return _with_numbers(row, {**found, **row.numbers})


def _read_row(id: str, files: Files, home: Path) -> Row:
    record_file, video, picture = (
        files.folder / name for name in (f"{id}{RECORD}", f"{id}{VIDEO}", f"{PREVIEWS}/{id}{PREVIEW}")
    )
    if leading_out := [path.name for path in (record_file, video) if not _is_inside(path, home)]:
        return Row(id, "failed", f"{printable(leading_out[0])} is a link that leads out of the run")
    card = card_of(id, files)
    settings = card.settings_by_key
    prompt = settings.get("prompt")
    row = Row(
        id,
        card.state,
        card.error or card.note,
        card.task,
        prompt if isinstance(prompt, str) else "",
        card.seed,
        picture=picture if picture.is_file() and _is_inside(picture, home) else None,
        alike=_alike(settings),
    )
    if not row.is_made:
        return row
    row = replace(row, video=video if video.is_file() else None)
    record = read_facts(record_file)
    numbers = record.get("numbers")
    if isinstance(numbers, dict):
        return _with_numbers(row, numbers)
    seams = record.get("seams")  # which earlier versions recorded too
    known = [seam for seam in seams.values() if is_number(seam)] if isinstance(seams, dict) else []
    return _with_numbers(replace(row, unmeasured=True), {"worst_seam": max(known)} if known else {})


def _with_numbers(row: Row, numbers: Mapping[str, Any]) -> Row:
    """Return a row with what is usable of the numbers of a record, and the names of what is not."""
    usable = {name: float(numbers[name]) for name in NUMBERS if is_number(numbers.get(name))}
    stretches = {name: found for name in STRETCHES if (found := _stretches(numbers.get(name)))}
    unusable = tuple(name for name in NUMBERS if name in numbers and name not in usable)
    return replace(row, numbers=usable, stretches=stretches, unusable=unusable)


def _is_inside(path: Path, home: Path) -> bool:
    """Return whether a path, after links are resolved, lies in a folder."""
    try:
        return path.resolve().is_relative_to(home)
    except (OSError, RuntimeError):  # links that lead to each other
        return False


def _stretches(value: Any) -> list[list[int]]:
    """Return the first stretches of a list of [first frame, last frame]; of any other value, none."""
    pairs = value[:MOST_STRETCHES] if isinstance(value, list) else []
    return [
        [int(frame) for frame in pair]
        for pair in pairs
        if isinstance(pair, list) and len(pair) == 2 and all(map(is_number, pair))
    ]


def _alike(settings: Mapping[str, Any]) -> tuple[str | int, ...] | None:
    """Return a job's values of `ALIKE`; None if one is missing or of another type."""
    values = tuple(settings.get(key) for key in ALIKE)
    known = isinstance(values[0], str) and all(isinstance(value, int) for value in values[1:])
    return values if known else None  # type: ignore[return-value]


def _free_motions(table: Mapping[str, Row]) -> dict[tuple[str | int, ...], float]:
    """Return the motions of a run's videos without given frames, by their values of `ALIKE`; of several, the first."""
    motions: dict[tuple[str | int, ...], float] = {}
    for row in table.values():
        if row.task == FREE_TASK and row.alike and row.numbers.get(MOTION, 0.0) > 0:
            motions.setdefault(row.alike, row.numbers[MOTION])
    return motions


def _with_share(row: Row, free: Mapping[tuple[str | int, ...], float]) -> Row:
    """Return a row of another task with its `MOTION_SHARE`, if a video without given frames is like it."""
    if row.task == FREE_TASK or row.alike is None or row.alike not in free or MOTION not in row.numbers:
        return row
    return replace(row, numbers={**row.numbers, MOTION_SHARE: row.numbers[MOTION] / free[row.alike]})
