"""Events for Prefect's server, which start deployments (flows/deployments.py) and notify people.

Each has the resource `pusa.run.RUN`, with the absolute path of the run's folder. An event that cannot be sent costs a
warning, and never the work that it reports.
"""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from prefect.events import emit_event

from pusa.finetune.measurements import comparable, read_measurements
from pusa.finetune.metrics import read_columns
from pusa.system.files import read_object, write_json
from pusa.system.text import first_line, printable

log = logging.getLogger("pusa.events")
JOB_MADE, JOB_FAILED = "pusa.job.made", "pusa.job.failed"
CHECKPOINT_WRITTEN, CHECKPOINT_BEST = "pusa.checkpoint.written", "pusa.checkpoint.best"
STAGE_ENDED = "pusa.{}.ended"
RUN = "pusa.run."  # and the run's folder: the id of the resource
ANNOUNCED = "checkpoints/announced.json"  # the last step whose checkpoint was announced
LONGEST_ERROR = 2000  # characters


def resource_of(run_dir: Path) -> str:
    """Return the id of a run folder's resource."""
    return f"{RUN}{run_dir.absolute()}"


def stage_ended(stage: str, run_dir: Path) -> None:
    """Report a stage that has ended, perhaps with failures, so that what it made can be used."""
    _emit(STAGE_ENDED.format(stage), run_dir)


def job_made(run_dir: Path, job: str, seconds: float | None) -> None:
    """Report a job whose video is there, after `seconds` of work; None: not all of it was timed."""
    _emit(JOB_MADE, run_dir, id=job, seconds=seconds)


def job_failed(run_dir: Path, job: str, error: str) -> None:
    """Report a job that was given up, and why."""
    _emit(JOB_FAILED, run_dir, id=job, error=printable(error, LONGEST_ERROR))


def checkpoint_written(run_dir: Path, step: int, loss: float | None) -> None:
    """Report a checkpoint, with its loss: as `checkpoint_loss` defines it, or that of `keep_best`."""
    _emit(CHECKPOINT_WRITTEN, run_dir, step=step, loss=loss)


def checkpoint_best(run_dir: Path, step: int, loss: float) -> None:
    """Report a checkpoint whose loss is lower than at all checkpoints before."""
    _emit(CHECKPOINT_BEST, run_dir, step=step, loss=loss)


def announce_checkpoints(run_dir: Path, every: int, keep_best: str | None = None) -> None:
    """Report the checkpoints that are new since the last call, also of an earlier process, in order.

    The best is reported at most once a call: the one of the new ones with the lowest loss, if it is lower than at all
    checkpoints before.

    Args:
        run_dir: the folder of a training.
        every: the number of steps between two checkpoints.
        keep_best: the loss of held-out clips that counts, in place of that of the training's own clips.
    """
    try:
        folder, record = run_dir / "checkpoints", run_dir / ANNOUNCED
        last = read_object(record).get("step")
        announced = last if type(last) is int else 0
        present = sorted(int(path.name) for path in folder.glob("*") if re.fullmatch(r"\d{8}", path.name))
        if not (new := [step for step in present if step > announced]):
            return
        loss_of = _losses_of(run_dir / "metrics.jsonl", every, keep_best)
        losses = {step: loss_of(step) for step in new}
        for step, loss in losses.items():
            checkpoint_written(run_dir, step, loss)
        lowest = min(((loss, step) for step, loss in losses.items() if loss is not None), default=None)
        earlier = (loss_of(step) for step in range(every, announced + 1, every))
        if lowest and all(loss is None or lowest[0] < loss for loss in earlier):
            checkpoint_best(run_dir, lowest[1], lowest[0])
        write_json(record, {"step": new[-1]})
    except OSError as error:
        log.warning("the checkpoints of %s cannot be announced: %s", run_dir, first_line(error))


def _losses_of(metrics: Path, every: int, keep_best: str | None) -> Callable[[int], float | None]:
    """Return the function from the step of a checkpoint to its loss, None where it has none."""
    if keep_best:
        return {one.step: one.value(keep_best) for one in comparable(read_measurements(metrics))}.get
    columns = read_columns(metrics, ("step", "loss"))
    return lambda step: checkpoint_loss(columns["step"], columns["loss"], step, every)


def checkpoint_loss(steps: np.ndarray, losses: np.ndarray, step: int, every: int) -> float | None:
    """Return the mean of the finite losses of the `every` steps up to a checkpoint; None if there are none.

    It is the loss on the clips of the training itself, with their random noise levels: a small change of it means
    little, and it falls further where a training only learns its clips by heart.

    Args:
        steps: the numbers of the steps, ascending, (N,).
        losses: their losses, (N,), NaN where a step was skipped.
        step: the step of the checkpoint.
        every: the number of steps between two checkpoints.
    """
    first, end = np.searchsorted(steps, (step - every, step), side="right")
    window = losses[first:end]
    finite = window[np.isfinite(window)]
    return float(finite.mean()) if len(finite) else None


def _emit(event: str, run_dir: Path, **payload: Any) -> None:
    """Hand an event to Prefect's thread, which sends it."""
    resource = {"prefect.resource.id": resource_of(run_dir), "prefect.resource.name": run_dir.name}
    try:
        emit_event(event, resource, payload={**payload, "run_dir": str(run_dir.absolute())})
    except Exception as error:  # noqa: BLE001  of any library that Prefect sends it with
        log.warning("%s of %s cannot be sent: %s: %s", event, run_dir, type(error).__name__, first_line(error))
