"""Show the progress of long work: a bar with the time left on a terminal, a log line now and then elsewhere.

Who follows the work in another way, as a dashboard does, listens: `listening`.
"""

import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from time import monotonic
from typing import Protocol, TypeVar

from tqdm import tqdm

log = logging.getLogger(__name__)
Item = TypeVar("Item")
SECONDS_BETWEEN_LINES = 10.0


class Listener(Protocol):
    """Follows work. Its methods are called in the threads that work, so they must be quick and must not raise."""

    def begun(self, progress: "Progress") -> None:
        """Note that work has begun. Any thread may look at its progress from now on."""

    def ended(self, id: str, seconds: float | None, error: str) -> None:
        """Note that a job is made, in `seconds` where that is known, or has failed for the reason `error`."""


_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Have a listener follow the work of this context, also in threads that get a copy of it."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def report_end(id: str, seconds: float | None = None, error: str = "") -> None:
    """Tell the listener, if there is one, how a job ended."""
    if listener := _listener.get():
        listener.ended(id, seconds, error)


class Progress:
    """Count up to `total`, in any threads.

    Args:
        label: the name of the work.
        total: how many units there are.
        start: how many of them were done before.
    """

    def __init__(self, label: str, total: int, start: int = 0) -> None:
        self.label, self.total, self.done = label, total, start
        self._advancing, self._begun = Lock(), False
        self._start, self._started_at, self._logged_at = start, monotonic(), monotonic()
        on_terminal = sys.stderr is not None and sys.stderr.isatty()  # None: closed when Python started
        self._bar = tqdm(total=total, initial=start, desc=label, leave=False) if on_terminal else None
        if listener := _listener.get():
            listener.begun(self)

    def advance(self, count: int = 1, note: str = "") -> None:
        """Add `count` finished units; `note` (such as the current loss) is shown beside the numbers."""
        with self._advancing:
            self.done += count
            if not self._begun:  # what was prepared before the first unit says nothing of the pace
                self._begun, self._start = True, self.done
                self._started_at = self._logged_at = monotonic()
            if self._bar is not None:
                self._bar.set_postfix_str(note, refresh=False)
                self._bar.update(count)
            elif monotonic() - self._logged_at >= SECONDS_BETWEEN_LINES or self.done == self.total:
                self._logged_at = monotonic()
                minutes, seconds = divmod(round(self.seconds_left), 60)
                left = f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
                log.info("%s: %d/%d, %s left %s", self.label, self.done, self.total, left, note)

    @property
    def seconds_left(self) -> float:
        """Estimate the time left from the pace so far."""
        pace = (monotonic() - self._started_at) / max(1, self.done - self._start)
        return pace * max(0, self.total - self.done)  # work that is done again counts twice

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()

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
