"""What training does, step by step: a line each in RUN/metrics.jsonl, and the same as curves for TensorBoard.

The lines are part of a run's state: each step has one, however often the run was killed. The curves are for looking at.
"""

import json
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic_core import from_json

from pusa.system.files import atomic
from pusa.system.text import first_line

log = logging.getLogger(__name__)
BANDS = 10  # of levels, that the loss is told of one by one
FLUSH_SECONDS = 10  # after which curves are on the disk
END = 2**53  # of steps: a float holds all before it exactly


@dataclass(frozen=True)
class StepMetrics:
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


class MetricsWriter:
    """The record of a run that goes on after step `start`; what a killed run noted beyond it is dropped.

    A context manager, for one process of a run.
    """

    def __init__(self, run_dir: Path, start: int) -> None:
        self.path = run_dir / "metrics.jsonl"
        self._curves_dir = run_dir / "tensorboard"
        self._start = start

    def __enter__(self) -> Self:
        with atomic(self.path) as partial, partial.open("wb") as file:
            file.writelines(line for row, line in _noted(self.path) if row["step"] <= self._start)
        with ExitStack() as opened:
            self._file = opened.enter_context(self.path.open("a", encoding="utf-8"))
            self._curves = opened.enter_context(closing(_Curves(self._curves_dir, self._start)))
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._opened.close()

    def add(self, measured: StepMetrics) -> None:
        """Note a step.

        Raises:
            OSError: the line could not be written. That curves could not be is logged, once, and no more.
        """
        self._file.write(_line(_row(measured)))
        self._file.flush()
        self._curves.add(measured.step, _scalars(measured))


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The steps noted in a metrics file, one by one, without lines that a kill tore; none where there is no file."""
    return (row for row, _ in _noted(path))


def read_losses(path: Path) -> Iterator[tuple[int, float | None]]:
    """Each step of a metrics file and its loss, None where the step was skipped."""
    return ((row["step"], _finite(row.get("loss"))) for row in read_metrics(path))


def read_columns(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Of all steps of a metrics file these numbers, each (N,); NaN where one was not noted, or not finite."""
    rows = (tuple(_number(row.get(name)) for name in names) for row in read_metrics(path))
    return dict(zip(names, np.fromiter(rows, np.dtype((float, len(names)))).T, strict=True))


def _noted(path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Each row of a metrics file, and its line as it is there, whole."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            row = _parsed(line)
            step = row.get("step") if isinstance(row, dict) else None
            if type(step) is int and 0 <= step < END:
                yield row, line.rstrip(b"\n") + b"\n"


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


def _row(measured: StepMetrics) -> dict[str, Any]:
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


def _scalars(measured: StepMetrics) -> dict[str, float]:
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


def _finite(value: Any) -> float | None:
    """The value if it is a number, and finite; an integer may be too large for a float."""
    return value if isinstance(value, int | float) and abs(value) <= sys.float_info.max else None


def _number(value: Any) -> float:
    return math.nan if (finite := _finite(value)) is None else finite


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _parsed(line: bytes) -> Any:
    for parse in (from_json, json.loads):  # the second takes half a surrogate too, which a file's name may hold
        with suppress(ValueError, RecursionError):
            return parse(line)
    return None
