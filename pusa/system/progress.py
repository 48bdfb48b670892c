"""Show the progress of long work: a bar with the time left on a terminal, a log line now and then elsewhere.

Who follows the work in another way, as a dashboard or a table on the terminal does, listens: `listening`.
"""

import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from time import monotonic
from typing import TypeVar

from tqdm import tqdm

log = logging.getLogger(__name__)
Item = TypeVar("Item")
SECONDS_BETWEEN_LINES = 10.0


class Listener:
    """Follows work, by those methods that it defines.

    They are called in the threads that work, so they must be quick and must not raise.

    Attributes:
        draws: whether it shows the progress where a bar or log lines would.
    """

    draws = False

    def begun(self, progress: "Progress") -> None:
        """Note that work has begun. Any thread may look at its progress from now on."""

    def closed(self, progress: "Progress") -> None:
        """Note that work is over, or was given up."""

    def counted(self, counts: Mapping[str, int]) -> None:
        """Note how many jobs are to be made ("jobs"), how many of them are "done", "drafted" and "failed", and others.

        The others, such as those "made already" or "not chosen", are not among "jobs".
        """

    def busy(self, worker: str, ids: tuple[str, ...], doing: str, steps: int) -> None:
        """Note what a worker does from now on, with which jobs; each has up to `steps` denoising steps."""

    def stepped(self, worker: str, id: str, steps: int) -> None:
        """Note that a worker has made denoising steps of a job."""

    def ended(self, id: str, seconds: float | None, error: str) -> None:
        """Note that a job or its draft is made, in `seconds` if known, or has failed for the reason `error`."""


_listeners: ContextVar[tuple[Listener, ...]] = ContextVar("listeners", default=())


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Have one more listener follow the work of this context, also in threads that get a copy of it."""
    token = _listeners.set((*_listeners.get(), listener))
    try:
        yield
    finally:
        _listeners.reset(token)


def report_counts(counts: Mapping[str, int]) -> None:
    """Tell the listeners how many jobs there are, and how many are in a state; see `Listener.counted`."""
    for listener in _listeners.get():
        listener.counted(counts)


def report_busy(worker: str, ids: tuple[str, ...] = (), doing: str = "", steps: int = 0) -> None:
    """Tell the listeners what a worker does from now on: by default, nothing."""
    for listener in _listeners.get():
        listener.busy(worker, ids, doing, steps)


def report_steps(worker: str, id: str, steps: int) -> None:
    """Tell the listeners that a worker has made denoising steps of a job."""
    for listener in _listeners.get():
        listener.stepped(worker, id, steps)


def report_end(id: str, seconds: float | None = None, error: str = "") -> None:
    """Tell the listeners how a job ended."""
    for listener in _listeners.get():
        listener.ended(id, seconds, error)


def can_draw() -> bool:
    """Return whether stderr shows a bar in place of the last one: a terminal does, and so does a notebook's cell."""
    if sys.stderr is None:  # closed when Python started
        return False
    is_cell = type(sys.stderr).__module__.startswith("ipykernel.")
    return is_cell or (sys.stderr.isatty() and os.environ.get("TERM") != "dumb")


def short_time(seconds: float) -> str:
    """Return a duration as "9s", "3m05s" or "2h10m"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


class Progress:
    """Count up to `total`, in any threads.

    Args:
        label: the name of the work.
        total: how many units there are.
        start: how many of them were done before.

    Attributes:
        note: what was last said beside the numbers.
    """

    def __init__(self, label: str, total: int, start: int = 0) -> None:
        self.label, self.total, self.done = label, total, start
        self._advancing, self._begun = Lock(), False
        self._start, self._started_at, self._logged_at = start, monotonic(), monotonic()
        self.note = ""
        self._listeners = _listeners.get()
        self._is_drawn = any(listener.draws for listener in self._listeners)
        has_bar = not self._is_drawn and can_draw()
        self._bar = tqdm(total=total, initial=start, desc=label, leave=False) if has_bar else None
        for listener in self._listeners:
            listener.begun(self)

    def advance(self, count: int = 1, note: str = "", earlier: bool = False) -> None:
        """Add `count` finished units; `note` (such as the current loss) is shown beside the numbers.

        Units that an `earlier` run finished say nothing of the pace.
        """
        with self._advancing:
            self.done += count
            self.note = note
            if earlier:
                self._start += count
            elif not self._begun:  # what was prepared before the first unit says nothing of the pace
                self._begun, self._start = True, self.done
                self._started_at = self._logged_at = monotonic()
            if self._bar is not None:
                self._bar.set_postfix_str(note, refresh=False)
                self._bar.update(count)
            elif not self._is_drawn and (
                monotonic() - self._logged_at >= SECONDS_BETWEEN_LINES or self.done == self.total
            ):
                self._logged_at = monotonic()
                left = f", {short_time(self.seconds_left)} left" if self.done < self.total else ""
                log.info("%s: %d/%d%s %s", self.label, self.done, self.total, left, note)

    @property
    def seconds_each(self) -> float | None:
        """Return how long a unit has taken on average so far; None before the second one that was not done before."""
        made = self.done - self._start
        return (monotonic() - self._started_at) / made if made > 0 else None

    @property
    def seconds_left(self) -> float:
        """Estimate the time left from the pace so far."""
        pace = (monotonic() - self._started_at) / max(1, self.done - self._start)
        return pace * max(0, self.total - self.done)  # work that is done again counts twice

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
        for listener in self._listeners:
            listener.closed(self)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def track(items: Iterable[Item], label: str, total: int) -> Iterator[Item]:
    """Yield the items and show how many of `total` are done."""
    with Progress(label, total) as progress:
        for item in items:
            yield item
            progress.advance()
