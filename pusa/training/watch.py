"""How a run is followed while it goes on, by the first process: metrics on disk, and how far it has come."""

from contextlib import ExitStack
from pathlib import Path
from typing import Self

from pusa.progress import Progress
from pusa.training.metrics import Measured, Metrics


class Watch:
    """A context manager. Of several processes, all but the first see to nothing."""

    def __init__(self, run_dir: Path, start: int, steps: int, is_first: bool) -> None:
        self._run_dir, self._start, self._steps, self._is_first = run_dir, start, steps, is_first
        self._opened = ExitStack()

    def __enter__(self) -> Self:
        if self._is_first:
            self._metrics = self._opened.enter_context(Metrics(self._run_dir, self._start))
            self._progress = self._opened.enter_context(Progress("finetune", self._steps, self._start))
        return self

    def __exit__(self, *exception: object) -> None:
        self._opened.close()

    def add(self, measured: Measured) -> None:
        """A step was made."""
        if self._is_first:
            self._metrics.add(measured)
            loss = "skipped" if measured.loss is None else f"loss {measured.loss:.4f}"
            self._progress.advance(note=f"{loss}, {measured.per_second(measured.samples):.2f} clips/s")
