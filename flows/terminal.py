"""Show the work of a command on the terminal while it runs: one table below the log lines, drawn again in place.

    jobs             ━━━━━━━━━━━━━━━━━━━━  12 of 40 done, 1 failed, 27 to make, 16 not chosen
    denoising steps  ━━━━━━━━━━━━━━━━━━━━  370/1,200  3m22s left  4.1/s
    worker     job         doing        steps  speed  left
    process 0  night-0013  denoising    12/30  2.1/s    9s
    process 1              loading vae
    made: night-0012 14.2 s, night-0011 14.5 s
    failed: night-0003: night/3.png does not exist

The calls of the threads that work only take notes; a thread of its own draws, and ends with the work.
"""

import os
import signal
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event, Lock, Thread, current_thread, main_thread
from time import monotonic, thread_time
from typing import TYPE_CHECKING, Literal

from flows.console import Footer, footer
from pusa.system.progress import Listener, Progress, listening, short_time
from pusa.system.text import printable

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

LOOK_SECONDS, MOST_SECONDS = 0.25, 2.0  # between two drawings, at least and at most
SHARE = 100  # after a drawing there is a pause of this many times what it cost, within these limits
MOST_BARS = 5
LATEST = 5  # jobs that are listed as made
FAILURES = 3  # that are listed
WIDE = 60  # columns from which on there is room for all that is known of a worker
FEW_ROWS = 8  # of a terminal that shows no workers
COLUMNS = ("worker", "job", "doing", "steps", "speed", "left")
ENDED = ("done", "drafted", "failed")  # states of the jobs that are to be made
FIRST_NUMBER = 3  # of the columns from which on they hold numbers


@dataclass
class _Worker:
    """What a worker does."""

    ids: tuple[str, ...] = ()
    doing: str = ""
    loading: str = ""  # what it loads meanwhile
    steps: int = 0  # of each job
    made: dict[str, int] = field(default_factory=dict)  # by job, steps
    first: tuple[int, float] | None = None  # the steps that were made, and when, at the start of the measured time
    last: tuple[int, float] = (0, 0.0)  # the same now

    def step(self, id: str, steps: int, now: float) -> None:
        """Add steps of a job. The first ones may be of an earlier run: they say nothing of the pace."""
        self.made[id] = self.made.get(id, 0) + steps
        self.last = max(self.made.values()), now
        self.first = self.first or self.last

    def seconds_each(self) -> float | None:
        """Return how long a step takes; None before it is known."""
        if self.first is None or self.last[0] <= self.first[0]:
            return None
        return (self.last[1] - self.first[1]) / (self.last[0] - self.first[0])

    def cells(self) -> list[str]:
        """Return what `COLUMNS` show of it; "" for what is unknown."""
        each, made = self.seconds_each(), self.last[0]
        job = f"{self.ids[0]} +{len(self.ids) - 1}" if len(self.ids) > 1 else "".join(self.ids)
        steps = f"{made}/{self.steps}" if self.made else ""
        pace = ["", ""] if each is None else [_pace(each), short_time(each * max(0, self.steps - made))]
        return [job, self.loading or self.doing or "waiting", steps, *pace]


class Table(Listener):
    """Take notes of the work, and draw them."""

    draws = True

    def __init__(self) -> None:
        self._lock = Lock()  # of the notes
        self._open: list[Progress] = []
        self._thread: Thread | None = None
        self._over = Event()
        self._clear()

    def _clear(self) -> None:
        self._counts: Mapping[str, int] = {}
        self._workers: dict[str, _Worker] = {}
        self._made: deque[str] = deque(maxlen=LATEST)
        self._failed: deque[str] = deque(maxlen=FAILURES)
        self._widths = [0] * len(COLUMNS)  # of the workers' columns, at their widest so far

    def begun(self, progress: Progress) -> None:
        """Show a bar from the next drawing on."""
        with self._lock:
            self._open.append(progress)
            if len(self._open) == 1:
                self._over = Event()
                self._thread = Thread(target=self._draw_until, args=(self._over,), name="terminal", daemon=True)
                self._thread.start()

    def closed(self, progress: Progress) -> None:
        """Remove a bar; with the last one, everything goes."""
        with self._lock:
            self._open = [other for other in self._open if other is not progress]
            if self._open:
                return
            self._over.set()
            self._clear()
            footer.show(())

    def counted(self, counts: Mapping[str, int]) -> None:
        """Show the numbers of jobs."""
        self._counts = counts

    def busy(self, worker: str, ids: tuple[str, ...], doing: str, steps: int) -> None:
        """Show what a worker does."""
        with self._lock:
            before = self._workers.setdefault(worker, _Worker())
            if doing and not ids:
                before.loading = doing
            elif ids and (ids, doing) == (before.ids, before.doing):
                before.loading = ""  # a part of the model was loaded on the way
            else:
                self._workers[worker] = _Worker(ids, doing, steps=steps)

    def stepped(self, worker: str, id: str, steps: int) -> None:
        """Show the steps of a worker's job."""
        with self._lock:
            self._workers.setdefault(worker, _Worker()).step(id, steps, monotonic())

    def ended(self, id: str, seconds: float | None, error: str) -> None:
        """List a job as made or failed."""
        with self._lock:
            if error:
                self._failed.appendleft(f"{id}: {error}")
            else:
                self._made.appendleft(id if seconds is None else f"{id} {seconds:.1f} s")

    def _draw_until(self, over: Event) -> None:
        """Draw now and then."""
        self.rows(80, 24)  # imports rich, which is no part of the cost
        pause = LOOK_SECONDS
        while not over.wait(pause):
            started = thread_time()
            size = None if _is_off() else Footer.size()
            rows = self.rows(*size) if size else []
            with self._lock:
                if not over.is_set():
                    footer.show(rows)
            pause = max(LOOK_SECONDS, min(MOST_SECONDS, SHARE * (thread_time() - started)))

    def rows(self, columns: int, lines: int) -> list[str]:
        """Return the rows of a terminal of a size: three quarters of it at most, so that log lines are seen above."""
        from rich.console import Console

        most = max(1, lines * 3 // 4 - 1)
        console = Console(file=sys.stderr, width=max(1, columns - 1), height=lines, highlight=False, emoji=False)
        with self._lock:
            parts = self._parts(most, _Words(console.encoding), columns)
        with console.capture() as drawn:
            for part in parts:
                console.print(part, no_wrap=True, overflow="crop")
        return drawn.get().rstrip("\n").split("\n")[:most]

    def _parts(self, most: int, words: "_Words", columns: int) -> list["RenderableType"]:
        """Return what is shown in up to `most` rows: the whole, then the workers, then the jobs that have ended."""
        bars, wide = self._open[:MOST_BARS], columns >= WIDE
        parts: list[RenderableType] = [words.whole(self._counts, bars, wide)]
        left = most - len(bars) - bool(self._counts)
        ends = [("failed", text) for text in self._failed] + [("made", ", ".join(self._made))] * bool(self._made)
        if most < FEW_ROWS:
            return parts
        left -= len(ends)
        if self._workers and left > 1:
            parts.append(words.workers(self._workers, left, self._widths, columns))
        return parts + [words.end(*end) for end in ends]


class _Words:
    """Put notes in words that an encoding has."""

    def __init__(self, encoding: str) -> None:
        self._encoding = encoding

    def cell(self, text: str, style: str = "") -> "Text":
        """Return a text for one row: nothing in it steers a terminal or marks it up."""
        from rich.text import Text

        known = printable(text).encode(self._encoding, "backslashreplace").decode(self._encoding)
        return Text(known, style, no_wrap=True, overflow="crop", end="")

    def whole(self, counts: Mapping[str, int], bars: Sequence[Progress], wide: bool) -> "RenderableType":
        """Return the counts of jobs and the bars."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table as Grid

        grid = Grid.grid(padding=(0, 2, 0, 0))
        for number in range(3 if wide else 2):
            least = max(map(len, ["jobs", *(bar.label for bar in bars)])) if number == 0 else None
            grid.add_column(no_wrap=True, min_width=least, width=20 if wide and number == 1 else None)

        def add(label: str, done: float, total: float, text: str) -> None:
            bar = [ProgressBar(max(total, 1), done, width=20, pulse=False)] if wide else []
            grid.add_row(self.cell(label), *bar, self.cell(text))

        if jobs := counts.get("jobs"):
            rest = max(0, jobs - sum(counts.get(state, 0) for state in ENDED))
            named = {
                name: f"{count:,} {name}" for name, count in counts.items() if count and name not in ("jobs", "done")
            }
            ended = [named.pop(state) for state in ENDED if state in named]
            whole = f"{counts.get('done', 0):,} of {jobs:,} done"
            text = ", ".join([whole, *ended, f"{rest:,} to make", *named.values()])
            add("jobs", jobs - rest, jobs, text)
        for bar in bars:
            each = bar.seconds_each
            known = [] if each is None else [f"{short_time(bar.seconds_left)} left", _pace(each)]
            note = [] if counts else [bar.note]  # of jobs, the rows below show more
            add(bar.label, bar.done, bar.total, "  ".join([f"{bar.done:,}/{bar.total:,}", *known, *note]))
        return grid

    def workers(self, workers: Mapping[str, _Worker], most: int, widths: list[int], columns: int) -> "RenderableType":
        """Return a table with a row for each worker, in up to `most` rows.

        Its columns are never narrower than `widths`, which grow: they stay where they are while jobs come and go.
        """
        from rich.cells import cell_len
        from rich.table import Table as Grid

        shown = most - 1 if len(workers) < most else most - 2
        rows = [[name, *worker.cells()] for name, worker in list(workers.items())[:shown]]
        widths[:] = [max(known) for known in zip(widths, *(map(cell_len, row) for row in rows), strict=True)]
        wide, fits = columns >= WIDE, sum(widths) + 2 * len(widths) <= columns
        table = Grid(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
        for number, (name, width) in enumerate(zip(COLUMNS, widths, strict=True)):
            if wide or name in ("worker", "job", "doing"):
                justify: Literal["left", "right"] = "right" if number >= FIRST_NUMBER else "left"
                least = width if wide and fits else None
                table.add_column(name, no_wrap=True, overflow="crop", justify=justify, min_width=least)
        for row in rows:
            table.add_row(*map(self.cell, row if wide else [*row[:2], row[3] or row[2]]))
        if (hidden := len(workers) - shown) > 0:
            table.add_row(self.cell(f"+{hidden:,} more"))
        return table

    def end(self, title: str, text: str) -> "RenderableType":
        """Return a row about jobs that have ended."""
        from rich.text import Text

        return Text.assemble(
            self.cell(f"{title}: ", "red" if title == "failed" else "green"), self.cell(text), end="\n"
        )


def _is_off() -> bool:
    """Return whether no progress is to be shown: a user's choice, and that of all ranks but one."""
    return bool(os.environ.get("TQDM_DISABLE"))


def _pace(seconds_each: float) -> str:
    return f"{1 / seconds_each:.1f}/s" if 0 < seconds_each < 1 else f"{seconds_each:.1f} s each"


@contextmanager
def shown_on_terminal() -> Iterator[None]:
    """Show the work of this context in a table if stderr is a terminal; TQDM_DISABLE=1 shows no progress at all."""
    if Footer.is_possible() and not _is_off():
        with listening(Table()), _removed_by_sigterm():
            yield
    else:
        yield


@contextmanager
def _removed_by_sigterm() -> Iterator[None]:
    """Have SIGTERM remove the table before it ends the process, unless it is handled or ignored."""

    def end(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        footer.show(())
        os.kill(os.getpid(), number)

    is_free = current_thread() is main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if is_free:
        signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if is_free:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
