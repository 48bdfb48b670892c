"""Record every training step: a line in RUN/metrics.jsonl, and points on TensorBoard's curves.

The lines are part of a run's state: each step has exactly one, however often the run was killed, and step 0 has one
where held-out clips are measured before the first step. The curves are for people only.
"""

import json
import logging
import math
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self

import numpy as np
from pydantic_core import from_json

from pusa.system.files import atomic, remove_partials
from pusa.system.text import first_line

if TYPE_CHECKING:  # it imports this module
    from pusa.finetune.measurements import Measurement

log = logging.getLogger(__name__)
BANDS = 10  # equal parts of the levels [0, 1], whose losses are recorded separately
STEP_LIMIT = 2**53  # a float represents every smaller step exactly
MAX_LINE = 1 << 20  # bytes; a step's line has some hundreds


@dataclass(frozen=True)
class StepMetrics:
    """The measurements of one step. `loss` and `grad_norm` are None where they were not finite.

    Args:
        step: the number of the step, from 1.
        loss: the mean over all processes.
        learning_rate: the rate that the step used.
        grad_norm: the norm before clipping.
        by_level: the mean loss of the frames whose level lies in [i / 10, (i + 1) / 10), None where there were none.
        samples: the number of clips, over all processes.
        tokens: the number of tokens of these clips.
        seconds: the duration.
        waited: the seconds of it spent waiting for data.
        memory: peak bytes in use on the device since the step before; on a CPU, by the process since its start.
        skipped: the ids of the clips, where the loss or gradient was not finite and nothing was changed; else empty.
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
        """Return a rate: `count` per second of this step."""
        return count / max(self.seconds, 1e-9)


class MetricsWriter:
    """Writes the metrics of a run that is resumed after step `start`; lines of later steps are dropped.

    A file that holds something else, more than the end of a line that a kill cut, is kept as metrics.jsonl.torn.

    A context manager, for the first process of a run.
    """

    def __init__(self, run_dir: Path, start: int) -> None:
        self.path = run_dir / "metrics.jsonl"
        self._curves_dir = run_dir / "tensorboard"
        self._start = start

    def __enter__(self) -> Self:
        remove_partials(self.path.parent, f"{self.path.name}*")
        if unread := _find_unread(self.path):
            torn = self.path.with_name(f"{self.path.name}.torn")
            log.warning("%s: %s; the file is kept as %s, and its other lines are used", self.path, unread, torn.name)
            with atomic(torn) as partial:
                shutil.copyfile(self.path, partial)
        with atomic(self.path) as partial, partial.open("wb") as file:
            file.writelines(line for row, line in _read_rows(self.path) if row["step"] <= self._start)
        with ExitStack() as stack:
            self._file = stack.enter_context(self.path.open("a", encoding="utf-8"))
            self._curves = stack.enter_context(closing(_Curves(self._curves_dir, self._start)))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def add(self, measured: StepMetrics, validation: "Measurement | None" = None) -> None:
        """Record a step, with the losses of held-out clips where they were measured after it.

        Raises:
            OSError: the line could not be written. Failing curves are only logged, once.
        """
        more = (validation.row(), validation.scalars()) if validation else ({}, {})
        self._write(measured.step, {**_row(measured), **more[0]}, {**_scalars(measured), **more[1]})

    def add_start(self, validation: "Measurement") -> None:
        """Record the losses of held-out clips before the first step, as step 0, in place of those of other settings.

        Raises:
            OSError: as `add`.
        """
        assert self._start == 0, "no step has been made"
        self._file.truncate(0)
        self._write(validation.step, {"step": validation.step, **validation.row()}, validation.scalars())

    def _write(self, step: int, row: dict[str, Any], scalars: dict[str, float]) -> None:
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        self._curves.add(step, scalars)


def read_metrics(path: Path, containing: bytes = b"") -> Iterator[dict[str, Any]]:
    """Yield the rows of a metrics file, but no incomplete line that a kill left; none if the file is missing.

    Args:
        path: the file.
        containing: other lines are left out, without the time to read them.
    """
    return (row for row, _ in _read_rows(path, containing))


def read_steps(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of the steps of a metrics file. Row 0 is none: it has what was measured before the first step."""
    return (row for row in read_metrics(path) if row["step"] > 0)


def read_losses(path: Path) -> Iterator[tuple[int, float | None]]:
    """Yield each step of a metrics file with its loss, None where the step was skipped."""
    return ((row["step"], finite(row.get("loss"))) for row in read_steps(path))


def read_columns(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Return columns of the steps of a metrics file by name, each (N,); NaN where a value is missing or not finite."""
    rows = (tuple(_number(row.get(name)) for name in names) for row in read_steps(path))
    return dict(zip(names, np.fromiter(rows, np.dtype((float, len(names)))).T, strict=True))


def finite(value: Any) -> float | None:
    """Return the value if it is a finite number, else None; an integer may be too large for a float."""
    return value if isinstance(value, int | float) and abs(value) <= sys.float_info.max else None


def _read_rows(path: Path, containing: bytes = b"") -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yield each row of a metrics file with its line, exactly as it is in the file."""
    return ((row, line.rstrip(b"\n") + b"\n") for row, line in _read_lines(path, containing) if row is not None)


def _find_unread(path: Path) -> str:
    """Describe the lines of a metrics file that are no rows, but for a last one without its end; "" without any."""
    count = first = 0
    for number, (row, line) in enumerate(_read_lines(path), 1):
        if row is None and line.endswith(b"\n") and line.strip():
            count, first = count + 1, first or number
    return f"{count} lines are not those of a step, the first is line {first}" if count else ""


def _read_lines(path: Path, containing: bytes = b"") -> Iterator[tuple[dict[str, Any] | None, bytes]]:
    """Yield the row, or None if it is not one, and the bytes of each line; of a very long line only the end."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        while line := file.readline(MAX_LINE):
            is_whole = len(line) < MAX_LINE or line.endswith(b"\n")
            end = line
            while not is_whole and end and not end.endswith(b"\n"):
                end = file.readline(MAX_LINE)
            if containing in line:
                yield (_parse_row(line), line) if is_whole else (None, end[-2:])


def _parse_row(line: bytes) -> dict[str, Any] | None:
    row: Any = None
    for parse in (from_json, json.loads):  # json reads lone surrogates too, which file names may contain
        with suppress(ValueError, RecursionError):
            row = parse(line)
            break
    step = row.get("step") if isinstance(row, dict) else None
    return row if type(step) is int and 0 <= step < STEP_LIMIT else None


class _Curves:
    """Writes TensorBoard's event files. If that fails, a warning is logged once, and training continues without.

    torch's SummaryWriter has a thread, which would print the traceback of a full disk.
    """

    def __init__(self, folder: Path, start: int) -> None:
        self.folder = folder
        self._file: BinaryIO | None = None
        with self._catch_errors():
            folder.mkdir(parents=True, exist_ok=True)
            name = f"events.out.tfevents.{time.time_ns() // 10**9}.{socket.gethostname()}.{os.getpid()}.{start}"
            self._file = (folder / name).open("ab")
            self._write(file_version="brain.Event:2")
            # Points of steps that are made again are hidden.
            self._write(step=start + 1, session_log={"status": "START"})

    def add(self, step: int, scalars: dict[str, float]) -> None:
        """Add a point to each curve."""
        with self._catch_errors():
            values = [{"tag": name, "simple_value": value} for name, value in scalars.items()]
            self._write(step=step, summary={"value": values})

    def close(self) -> None:
        """Close the file."""
        with self._catch_errors():
            if self._file is not None:
                self._file.close()

    def _write(self, **content: Any) -> None:
        if self._file is None:
            return
        from tensorboard.compat.proto.event_pb2 import Event  # slow to import, and only used here
        from tensorboard.summary.writer.record_writer import RecordWriter

        RecordWriter(self._file).write(Event(wall_time=time.time(), **content).SerializeToString())
        self._file.flush()

    @contextmanager
    def _catch_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            log.warning("%s gets no more curves, training continues: %s", self.folder, first_line(error))
            with suppress(OSError):  # what could not be written is tried again
                if self._file is not None:
                    self._file.close()
            self._file = None


def _row(measured: StepMetrics) -> dict[str, Any]:
    """Return the line of a step as a mapping."""
    row = {
        "step": measured.step,
        "loss": finite(measured.loss),
        "learning_rate": measured.learning_rate,
        "grad_norm": finite(measured.grad_norm),
        "by_level": [finite(loss) for loss in measured.by_level],
        "seconds": round(measured.seconds, 4),
        "waited": round(measured.waited, 4),
        "samples_per_second": round(measured.per_second(measured.samples), 4),
        "tokens_per_second": round(measured.per_second(measured.tokens), 1),
        "memory_bytes": measured.memory,
    }
    return {**row, "skipped": list(measured.skipped)} if measured.skipped else row


def _scalars(measured: StepMetrics) -> dict[str, float]:
    """Return the points of a step on TensorBoard's curves, without values that are None or not finite."""
    by_level = {f"loss_by_level/{i / BANDS:.1f}-{(i + 1) / BANDS:.1f}": v for i, v in enumerate(measured.by_level)}
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
    return {name: known for name, value in scalars.items() if (known := finite(value)) is not None}


def _number(value: Any) -> float:
    return math.nan if (known := finite(value)) is None else known
