"""How far long work has come: a bar with the time left on a terminal, a plain line now and then elsewhere."""

import logging
import sys
from collections.abc import Iterable, Iterator
from time import monotonic
from typing import TypeVar

from tqdm import tqdm

log = logging.getLogger(__name__)
Item = TypeVar("Item")
SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts up to `total`; `advance` may carry a note such as the current loss."""

    def __init__(self, label: str, total: int, start: int = 0) -> None:
        self.label, self.total, self.done = label, total, start
        self._start, self._began, self._said = start, monotonic(), monotonic()
        self._bar = tqdm(total=total, initial=start, desc=label, leave=False) if sys.stderr.isatty() else None

    def advance(self, count: int = 1, note: str = "") -> None:
        """`count` more are done."""
        self.done += count
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        elif monotonic() - self._said >= SECONDS_BETWEEN_LINES or self.done == self.total:
            self._said = monotonic()
            log.info("%s: %d/%d, %s left %s", self.label, self.done, self.total, _duration(self.seconds_left), note)

    @property
    def seconds_left(self) -> float:
        """An estimate from the pace so far."""
        pace = (monotonic() - self._began) / max(1, self.done - self._start)
        return pace * (self.total - self.done)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def track(items: Iterable[Item], label: str, total: int) -> Iterator[Item]:
    """Yield the items, showing how far it has come."""
    with Progress(label, total) as progress:
        for item in items:
            yield item
            progress.advance()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
