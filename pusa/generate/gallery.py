"""Show what a run made: a page that plays every video, and a picture with a strip of frames of each."""

import os
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import groupby, product
from math import inf
from pathlib import Path
from threading import Lock
from time import monotonic

import numpy as np

from pusa.generate.cards import DRAFT, STATES, Card, Files, as_text, card_of, read_facts
from pusa.generate.outputs import RECORD, VIDEO
from pusa.generate.page import render
from pusa.generate.sweeps import Axis, Grid, find_grids
from pusa.system.failures import Failure, attempt
from pusa.system.files import digest, write_text
from pusa.system.slots import Result, Step
from pusa.system.text import printable
from pusa.system.threads import DaemonThreadPool
from pusa.tasks.base import Settings
from pusa.video.media import probe, read_frames, write_image
from pusa.video.sheets import labelled_strip, stack_pictures, strip_indices

SHEET_VIDEOS = 24  # of the contact sheet
DECODERS = 4  # that read these at once: most of their time is spent on starting
MOST_JOBS = 5000  # on the page: browsers hold no more
MOST_COLUMNS = 6  # of a sweep's table, where another axis has fewer
SECONDS_BETWEEN = 30.0  # from one writing of the page to the next, while jobs are made
LARGEST_SHARE = 0.05  # of the time that the writing takes: with very many jobs it is done less often
LONGEST_HEAD = 120  # characters of a swept value above a column


@dataclass
class Table:
    """Cards in rows and columns with heads; a row without a head has its cards side by side, each with its column's."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[Card]]]


@dataclass
class Section:
    """Cards that follow each other, or the tables of a sweep, with a title and what all its cards have in common."""

    title: str = ""
    prompt: str = ""
    about: list[str] = field(default_factory=list)
    chips: list[tuple[str, str]] = field(default_factory=list)
    cards: list[Card] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


def write_gallery(folder: Path, ids: Sequence[str]) -> Path:
    """Write `folder/gallery.html` with these jobs, in order, as their files are now; return its path."""
    shown = ids[:MOST_JOBS]
    files = Files(folder)
    cards = [card_of(id, files) for id in shown]
    usual = _add_chips(cards)
    counts = Counter(card.state for card in cards)
    run = folder.resolve().parent if folder.name == "videos" else folder.resolve()
    now = datetime.now(UTC).astimezone()
    page = render(
        title=printable(run.name or str(run)),
        run_key=digest(os.fsencode(run).hex())[:16],
        command=f"pusa finish {shlex.quote(str(run)) if str(run).isprintable() else 'RUN'}",
        written=now.strftime("%Y-%m-%d %H:%M"),
        written_at=now.isoformat(timespec="seconds"),
        count=len(ids),
        hidden=len(ids) - len(shown),
        counts=[(state, counts[state]) for state in STATES],
        tasks=sorted(Counter(card.task for card in cards if card.task).items()),
        usual=usual,
        every=all(key not in dict(usual) for card in cards for key, _ in card.chips),
        failures=_failures(cards),
        failed=counts["failed"],
        drafts=counts[DRAFT],
        sections=_sections(cards),
    )
    write_text(folder / "gallery.html", page)
    return folder / "gallery.html"


class LiveGallery:
    """Writes the page again while jobs are made. What fails here is not reported: the page is written at the end, too.

    Args:
        folder: the folder of the videos.
        ids: the jobs, in order.
        now: returns the time, in seconds.
    """

    def __init__(self, folder: Path, ids: Sequence[str], now: Callable[[], float] = monotonic) -> None:
        self._folder, self._ids, self._now = folder, ids, now
        self._next, self._writing = -inf, Lock()

    def write(self) -> None:
        """Write the page, unless that was done less than `SECONDS_BETWEEN` ago, or is being done in another thread."""
        if not self._writing.acquire(blocking=False):
            return
        try:
            if (begun := self._now()) < self._next:
                return
            attempt(partial(write_gallery, self._folder, self._ids), self._folder)
            took = self._now() - begun
            self._next = begun + max(SECONDS_BETWEEN, took / LARGEST_SHARE)
        finally:
            self._writing.release()

    def after(self, step: Step) -> Step:
        """Return a step that writes the page after each call."""

        def step_and_write(name: str, call: Callable[[], Result]) -> Result:
            try:
                return step(name, call)
            finally:
                self.write()

        return step_and_write


def write_sheet(folder: Path, ids: list[str]) -> Path:
    """Write `folder/gallery.jpg`, a labelled strip of each of the first `SHEET_VIDEOS` videos; return its path.

    Jobs without a readable video are left out.
    """
    done = [id for id in ids[:SHEET_VIDEOS] if read_facts(folder / f"{id}{RECORD}").get("status") == "done"]
    with closing(DaemonThreadPool(DECODERS)) as pool:
        reading = [pool.submit(attempt, partial(_strip, id, folder / f"{id}{VIDEO}"), folder) for id in done]
        strips = [strip.result() for strip in reading]
    write_image(folder / "gallery.jpg", stack_pictures([strip for strip in strips if not isinstance(strip, Failure)]))
    return folder / "gallery.jpg"


def _strip(id: str, video: Path) -> np.ndarray:
    return labelled_strip(id, read_frames(video, strip_indices(probe(video).num_frames)))


def _add_chips(cards: Sequence[Card]) -> list[tuple[str, str]]:
    """Give each card the settings by which it stands out; return the usual ones, which are stated once for the page.

    A value is usual if it is not the default and all cards have it, or more than half where every task has the key.
    """
    known = [card for card in cards if card.settings]
    counts = Counter((key, text) for card in known for key, text, _ in card.settings if key != "prompt")
    differing = {(key, text) for card in known for key, text, differs in card.settings if differs}
    least = {key: len(known) // 2 + 1 if key in Settings.model_fields else len(known) for key, _ in counts}
    most = {key: text for (key, text), count in counts.items() if count >= max(2, least[key])}
    usual = {key: text for key, text in most.items() if (key, text) in differing}
    for card in known:
        own = {key: text for key, text, _ in card.settings}
        card.chips = [
            (key, text)
            for key, text, differs in card.settings
            if key != "prompt" and (text != usual[key] if key in usual else differs)
        ]
        card.chips += [(key, "none") for key in usual if key in card.settings_by_key and key not in own]
    return list(usual.items())


def _failures(cards: Sequence[Card]) -> list[tuple[str, list[Card]]]:
    """Return why jobs failed, each reason once, with its jobs."""
    by_reason: dict[str, list[Card]] = {}
    for card in cards:
        if card.state == "failed":
            by_reason.setdefault(card.error, []).append(card)
    return list(by_reason.items())


def _sections(cards: Sequence[Card]) -> list[Section]:
    """Return the cards in order: sweeps as tables, at the place of their first jobs, and the others as they follow."""
    by_id = {card.id: card for card in cards}
    place_of = {id: place for place, id in enumerate(by_id)}
    grids = find_grids({card.id: card.settings_by_key for card in cards})
    first = {min(grid.ids.values(), key=place_of.__getitem__): grid for grid in grids}
    in_grids = {id for grid in grids for id in grid.ids.values()}
    entries = [first.get(card.id, card) for card in cards if card.id in first or card.id not in in_grids]
    sections: list[Section] = []
    for axes, group in groupby(entries, key=lambda entry: entry.axes if isinstance(entry, Grid) else None):
        members, before = list(group), len(sections)
        alike = [entry for entry in members if isinstance(entry, Grid)]
        if axes is None:
            sections.append(Section(cards=[entry for entry in members if isinstance(entry, Card)]))
        elif len(axes) == 1 and len(alike) > 1:  # such as a glob's files with a sweep: a row for each file
            sections.append(_rows_section(alike, axes[0], by_id))
        else:
            sections += [Section(printable(grid.base), tables=list(_tables(grid, by_id))) for grid in alike]
        for section in sections[before:] if axes else ():
            _share(
                section,
                {axis.key for axis in axes or ()},
                alike[0].base if len(axes or ()) > 1 or len(alike) == 1 else "",
            )
    return sections


def _share(section: Section, swept: Set[str], base: str) -> None:
    """Move what all cards of a sweep have in common to its section; what is swept shows in the labels."""
    cards = []
    for table in section.tables:
        for head, row in table.rows:
            for card, column in zip(row, table.columns, strict=True):
                card.base, card.label = printable(base), ", ".join(filter(None, (table.title, head, column)))
                cards.append(card)
    shared = set.intersection(*(set(card.chips) for card in cards))
    section.chips = [chip for chip in cards[0].chips if chip in shared]
    alike = frozenset(key for key in ("prompt", "task", "seed") if len({getattr(card, key) for card in cards}) == 1)
    section.prompt = cards[0].prompt if "prompt" in alike else ""
    section.about = [f"seed {card.seed}" if key == "seed" else card.task for key in ("task", "seed") if key in alike]
    for card in cards:
        card.shared = alike | (swept & {"prompt", "seed"})
        card.chips = [chip for chip in card.chips if chip not in shared and chip[0] not in swept]


def _rows_section(grids: Sequence[Grid], axis: Axis, by_id: Mapping[str, Card]) -> Section:
    """Return sweeps of the same values as one table with a row for each."""
    columns = _heads(axis)
    rows = [(printable(grid.base), [by_id[grid.ids[place,]] for place in range(len(columns))]) for grid in grids]
    return Section(as_text(axis.key), tables=[Table("", columns, rows)])


def _tables(grid: Grid, by_id: Mapping[str, Card]) -> Iterator[Table]:
    """Yield the tables of a sweep: one for each value of the outer axes, with the last two as rows and columns."""
    if len(grid.axes) == 1:
        row = [by_id[grid.ids[place,]] for place in range(len(grid.axes[0].values))]
        yield Table("", _heads(grid.axes[0]), [("", row)])
        return
    *outer, rows, columns = grid.axes
    for places in product(*(range(len(axis.values)) for axis in outer)):
        title = ", ".join(_heads(axis)[place] for axis, place in zip(outer, places, strict=True))
        cells = {
            (row, column): by_id[grid.ids[(*places, row, column)]]
            for row, column in product(range(len(rows.values)), range(len(columns.values)))
        }
        yield _table(title, rows, columns, cells)


def _table(title: str, rows: Axis, columns: Axis, cells: Mapping[tuple[int, int], Card]) -> Table:
    """Return a table whose longer axis goes across the page, or down where it is longer than `MOST_COLUMNS`."""
    across, down = len(columns.values), len(rows.values)
    if (down > across and down <= MOST_COLUMNS) or (across > down and across > MOST_COLUMNS):
        rows, columns, cells = columns, rows, {(row, column): card for (column, row), card in cells.items()}
    heads = _heads(columns)
    return Table(
        title,
        heads,
        [(head, [cells[row, column] for column in range(len(heads))]) for row, head in enumerate(_heads(rows))],
    )


def _heads(axis: Axis) -> list[str]:
    """Return the key with each value of an axis."""
    return [f"{as_text(axis.key)} {as_text(value, LONGEST_HEAD)}" for value in axis.values]
