"""Write the numbers of one run or two as a page: one file that holds its pictures, its style and its script.

The script only sorts the table. A browser runs no other one and loads nothing else: the page's policy names its hash.
"""

import base64
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pusa.evaluate.listing import job_state, notes, shown_value
from pusa.evaluate.reading import read_videos
from pusa.evaluate.runs import CHANGE, KNOWN, Comparison, Line, Row
from pusa.evaluate.thresholds import Outcome, all_problems
from pusa.generate.page import FOLDER as GALLERY
from pusa.generate.page import source_of, template_in
from pusa.system.failures import Failure
from pusa.system.files import write_text
from pusa.system.text import printable
from pusa.video.media import probe, read_frames
from pusa.video.sheets import film_strip, strip_indices

FOLDER = Path(__file__).parent
MOST_JOBS = 5000  # on the page, as in the gallery
MOST_STRIPS = 100  # videos that are read for the page; the others show their picture in the gallery
STRIP_HEIGHT, STRIP_WIDTH = 72, 900  # pixels at most
JPEG_QUALITY = 80
LARGEST_PICTURE, LARGEST_SUM = 1 << 17, 1 << 26  # bytes of a picture, and of all pictures
LONGEST = 300  # characters of a prompt


@dataclass(frozen=True)
class Side:
    """A row of the table: a job in a run, or the change between two."""

    label: str
    state: str
    why: str
    picture: str
    cells: list[tuple[str, str]]  # the text of each number, and the CSS class of its cell
    stretches: str


@dataclass(frozen=True)
class Entry:
    """A job: what its rows have in common, and the values by which the script sorts it, null where it has none."""

    id: str
    about: str
    prompt: str
    values: str
    sides: list[Side]


def write_page(comparison: Comparison, outcomes: Sequence[Outcome], path: Path) -> None:
    """Write the page; jobs after the first `MOST_JOBS` are counted only.

    Raises:
        OSError: it could not be written.
    """
    from markupsafe import Markup

    shown = comparison.lines[:MOST_JOBS]
    pictures = _Pictures([row for line in shown for row in line.rows if row])
    files = GALLERY / "gallery.css", FOLDER / "evaluate.css", FOLDER / "sort.js"
    look, own_look, script = (file.read_text(encoding="utf-8") for file in files)
    style = look + own_look
    policy = (
        f"default-src 'none'; img-src data:; style-src {source_of(style)}; script-src {source_of(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    page = template_in(FOLDER, "evaluate.html").render(
        policy=policy,
        style=Markup(style),  # noqa: S704
        script=Markup(script),  # noqa: S704
        title=" and ".join(printable(run) for run in comparison.runs),
        several=len(comparison.runs) > 1,
        count=len(comparison.lines),
        hidden=len(comparison.lines) - len(shown),
        columns=[(name, KNOWN[name]) for name in comparison.columns],
        outcomes=outcomes,
        problems=all_problems(outcomes),
        notes=notes(comparison),
        entries=[_entry(line, comparison, pictures) for line in shown],
        totals=list(_totals(comparison)),
    )
    write_text(path, page.encode("utf-8", "backslashreplace").decode("utf-8"))


def _entry(line: Line, comparison: Comparison, pictures: "_Pictures") -> Entry:
    known, last = line.known, line.sides[-1]
    about = ", ".join(filter(None, (known.task, known.seed and f"seed {known.seed}")))
    values = json.dumps([last.get(name) for name in comparison.columns])
    sides = [_side(line, side, comparison, pictures) for side in range(len(comparison.labels))]
    return Entry(line.id, about, printable(known.prompt, LONGEST), values, sides)


def _side(line: Line, side: int, comparison: Comparison, pictures: "_Pictures") -> Side:
    row = line.rows[side] if side != CHANGE else None
    numbers = line.sides[side]
    stretches = [
        f"{name} {', '.join(f'{first}-{last}' for first, last in pairs)}"
        for name, pairs in (row.stretches.items() if row else ())
    ]
    return Side(
        comparison.labels[side],
        job_state(line, side),
        printable(row.why, LONGEST) if row else "",
        pictures.of(row) if row else "",
        [_cell(name, numbers.get(name), side) for name in comparison.columns],
        "; ".join(stretches),
    )


def _cell(name: str, value: float | None, side: int) -> tuple[str, str]:
    """Return the text of a number, and for a change whether it is one for the better or the worse."""
    better = KNOWN[name].better
    if side != CHANGE or not value or better is None:
        return shown_value(value, side), ""
    return shown_value(value, side), "gain" if (value > 0) == (better == "high") else "loss"


def _totals(comparison: Comparison) -> Iterator[tuple[str, str, list[str]]]:
    """Yield the mean and the worst values of each side: the row's title, the side's label, the texts."""
    for side, label in enumerate(comparison.labels):
        yield "mean", label, [shown_value(comparison.mean(side, name), side) for name in comparison.columns]
    for side, label in enumerate(comparison.labels):
        worst = [comparison.worst(side, name) for name in comparison.columns]
        yield "worst", label, [shown_value(found[1] if found else None, side) for found in worst]


class _Pictures:
    """The pictures of videos as addresses that hold them: strips of the first videos, and of others their posters."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._left = LARGEST_SUM
        made = read_videos(_strip, [row.video for row in rows if row.video][:MOST_STRIPS], "strips")
        self._strips = {video: strip for video, strip in made.items() if not isinstance(strip, Failure)}

    def of(self, row: Row) -> str:
        """Return the address of a row's picture; "" if there is none, or the page holds too much already."""
        data = self._strips.get(row.video) if row.video else None
        data = data or (_read_small(row.picture) if row.picture else b"")
        self._left -= len(data)
        return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}" if data and self._left > 0 else ""


def _strip(video: Path) -> bytes:
    """Return a strip of a video's frames as JPEG."""
    frames = read_frames(video, strip_indices(probe(video).num_frames))
    buffer = io.BytesIO()
    strip = film_strip(frames, STRIP_HEIGHT, most_width=STRIP_WIDTH)
    Image.fromarray(strip).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def _read_small(picture: Path) -> bytes:
    """Return the bytes of a JPEG that is not too large; none of any other file."""
    try:
        with picture.open("rb") as file:
            data = file.read(LARGEST_PICTURE + 1)
    except OSError:
        return b""
    return data if data.startswith(b"\xff\xd8") and len(data) <= LARGEST_PICTURE else b""
