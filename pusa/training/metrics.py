"""What training does, step by step: a line each in RUN/metrics.jsonl, and the same as curves for TensorBoard.

The lines are part of a run's state: each step has one, however often the run was killed. The curves are for looking at.
"""

import json
import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pusa.files import write_text
from pusa.words import first_line

log = logging.getLogger(__name__)
BANDS = 10  # of levels, that the loss is told of one by one
FLUSH_SECONDS = 10  # after which curves are on the disk


@dataclass(frozen=True)
class Measured:
    """One step. `loss` and `grad_norm` are None where they were not finite.

    Args:
        step: the step just made, from 1 on.
        loss: its mean over all processes.
        learning_rate: that it was made with.
        grad_norm: before clipping.
        by_level: the mean loss of the frames whose level lies in [i / 10, (i + 1) / 10), None where there was none.
        samples: clips, of all processes.
        tokens: of these clips' videos.
        seconds: that it took.
        waited: seconds of these in which it waited for data.
        memory: the most bytes in use on the device since the step before; on a CPU, by the process so far.
        skipped: the clips of a step that changed nothing, since its loss or gradient was not finite; else empty.
    """

    step: int
    loss: float | None
    learning_rate: float
    grad_norm: float | None
    by_level: tuple[float | None, ...]
    samples: int
    tokens: int
    seconds: float
    waited: float
    memory: int
    skipped: tuple[str, ...] = ()

    def per_second(self, count: int) -> float:
        """How many of `count` things a step a second saw."""
        return count / max(self.seconds, 1e-9)


class Metrics:
    """The record of a run that goes on after step `start`; what a killed run noted beyond it is dropped.

    A context manager, for one process of a run.
    """

    def __init__(self, run_dir: Path, start: int) -> None:
        self.path = run_dir / "metrics.jsonl"
        self._curves_dir = run_dir / "tensorboard"
        self._start = start

    def __enter__(self) -> Self:
        kept = (row for row in read_metrics(self.path) if row["step"] <= self._start)
        write_text(self.path, "".join(map(_line, kept)))
        with ExitStack() as opened:
            self._file = opened.enter_context(self.path.open("a", encoding="utf-8"))
            self._curves = opened.enter_context(closing(_Curves(self._curves_dir, self._start)))
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._opened.close()

    def add(self, measured: Measured) -> None:
        """Note a step.

        Raises:
            OSError: the line could not be written. That curves could not be is logged, once, and no more.
        """
        self._file.write(_line(_row(measured)))
        self._file.flush()
        self._curves.add(measured.step, _scalars(measured))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The steps noted in a metrics file, without lines that a kill tore; none where there is no file."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    rows = map(_parsed, text.splitlines())
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


def losses(path: Path) -> list[tuple[int, float | None]]:
    """Each step of a metrics file and its loss, None where the step was skipped."""
    return [(row["step"], row.get("loss")) for row in read_metrics(path)]


class _Curves:
    """TensorBoard's event files. Where they cannot be written, that is said once, and training goes on."""

    def __init__(self, folder: Path, start: int) -> None:
        self.folder = folder
        self._writer: Any = None
        with self._forgiven():
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and nobody else needs it

            # What was drawn of steps that are made again is hidden.
            self._writer = SummaryWriter(str(folder), purge_step=start + 1, flush_secs=FLUSH_SECONDS)

    def add(self, step: int, scalars: dict[str, float]) -> None:
        """A point on each curve."""
        with self._forgiven():
            for name, value in scalars.items() if self._writer is not None else ():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is left."""
        with self._forgiven():
            if self._writer is not None:
                self._writer.close()

    @contextmanager
    def _forgiven(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            log.warning("%s gets no more curves, training goes on: %s", self.folder, first_line(error))
            self._writer = None


def _row(measured: Measured) -> dict[str, Any]:
    row = {
        "step": measured.step,
        "loss": _finite(measured.loss),
        "learning_rate": measured.learning_rate,
        "grad_norm": _finite(measured.grad_norm),
        "by_level": [_finite(loss) for loss in measured.by_level],
        "seconds": round(measured.seconds, 4),
        "waited": round(measured.waited, 4),
        "samples_per_second": round(measured.per_second(measured.samples), 4),
        "tokens_per_second": round(measured.per_second(measured.tokens), 1),
        "memory_bytes": measured.memory,
    }
    return {**row, "skipped": list(measured.skipped)} if measured.skipped else row


def _scalars(measured: Measured) -> dict[str, float]:
    """What there is to draw; what is None is left out."""
    by_level = {f"loss_by_level/{_band(i)}": loss for i, loss in enumerate(measured.by_level)}
    scalars = {
        "loss": measured.loss,
        **by_level,
        "grad_norm": measured.grad_norm,
        "learning_rate": measured.learning_rate,
        "samples_per_second": measured.per_second(measured.samples),
        "tokens_per_second": measured.per_second(measured.tokens),
        "data_wait": measured.per_second(1) * measured.waited,
        "memory_gib": measured.memory / 2**30,
        "skipped": float(bool(measured.skipped)),
    }
    return {name: finite for name, value in scalars.items() if (finite := _finite(value)) is not None}


def _band(index: int) -> str:
    return f"{index / BANDS:.1f}-{(index + 1) / BANDS:.1f}"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _parsed(line: str) -> Any:
    try:
        return json.loads(line, parse_constant=lambda name: None)  # NaN is no JSON, but some write it
    except ValueError:
        return None
