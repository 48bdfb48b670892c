"""Tell those whom a manifest names, and the worker's command, what became of a run of a stage.

With Prefect or without it, each stage of a pipeline has a notice of its own. A notice that cannot be sent costs a
warning and never changes what became of the run.
"""

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Any

from flows.console import title_of
from pusa.errors import PartlyFailed, PusaError, Reason
from pusa.manifest.models import Manifest
from pusa.system.notices import COMMAND, NOTICE_SECONDS, notify
from pusa.system.text import first_line, printable

log = logging.getLogger("pusa.notices")
COMPLETED, WITH_FAILURES, FAILED, CANCELLED = "completed", "completed with failures", "failed", "cancelled"
MAX_FAILED = 20  # failures in a notice
CANCELLED_SECONDS = 8.0  # for the notices of a run that is to end at once


@dataclass
class Outcome:
    """What a stage returned, once it did."""

    result: Any = None


@contextmanager
def noticed(stage: str, manifest: Manifest, source: Path, run_dir: Path) -> Iterator[Outcome]:
    """Send the notices of a stage's run when this context ends, however it does.

    Args:
        stage: the name of the stage.
        manifest: says whom to notify.
        source: the manifest's file.
        run_dir: the folder of the run.
    """
    outcome, begun = Outcome(), monotonic()
    error: BaseException | None = None
    try:
        yield outcome
    except BaseException as raised:
        error = raised
        raise
    finally:
        if manifest.on_end or manifest.on_failure or os.environ.get(COMMAND):
            try:
                state, why = _state_of(outcome, error)
                addresses = [*manifest.on_end, *(manifest.on_failure if state in (WITH_FAILURES, FAILED) else ())]
                notice = describe(stage, source, run_dir, state, outcome.result, why, monotonic() - begun)
                limit = CANCELLED_SECONDS if state == CANCELLED else NOTICE_SECONDS
                for problem in notify(list(dict.fromkeys(addresses)), notice, seconds=limit):
                    log.warning("a notice of this run was not received by %s", problem)
            except Exception as problem:  # noqa: BLE001  what became of the run counts
                log.warning("no notice of this run could be sent: %s: %s", type(problem).__name__, first_line(problem))


def _state_of(outcome: Outcome, error: BaseException | None) -> tuple[str, BaseException | None]:
    """Return the state of a run, and the error that explains it."""
    if isinstance(error, Exception) and not isinstance(error, PartlyFailed):
        return FAILED, error
    if error is not None and not isinstance(error, PartlyFailed):  # an interrupt, or the signal of a cancellation
        return CANCELLED, error
    try:
        if require_all := getattr(outcome.result, "require_all", None):
            require_all()
    except PartlyFailed as partly:
        return WITH_FAILURES, partly
    return (WITH_FAILURES if error else COMPLETED), error


def describe(
    stage: str, source: Path, run_dir: Path, state: str, result: Any, error: BaseException | None, seconds: float
) -> dict[str, Any]:
    """Return a notice as JSON values. Its `text` is a sentence for people, which chat programs show."""
    failed, counts = _failures(result), _counts(result)
    run = f"{stage} {source.absolute().parent.name}/{source.name}"
    message = None if error is None else printable(str(error) or type(error).__name__, 1000)
    listed = ", ".join(
        f"{count:,} {title_of(result, name)}" for name, count in counts.items() if count and type(count) is int
    )
    why = f" ({first_line(error)})" if error is not None and str(error) else ""
    return {
        "text": printable(f"{run}: {state}{f': {listed}' if listed else ''}{why}", 1000),
        "run": run,
        "stage": stage,
        "state": state,
        "manifest": str(source.absolute()),
        "run_dir": str(run_dir.absolute()),
        "counts": counts,
        "failed": failed,
        "error": message,
        "seconds": round(seconds, 3),
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "link": _link(),
    }


def _counts(result: Any) -> dict[str, int | float]:
    """Return the numbers of a result, and the lengths of its lists."""
    values = {field.name: getattr(result, field.name) for field in fields(result)} if result is not None else {}
    sized = {name: len(value) if isinstance(value, list | dict) else value for name, value in values.items()}
    return {name: value for name, value in sized.items() if type(value) in (int, float) and name != "kinds"}


def _failures(result: Any) -> dict[str, str]:
    """Return why jobs, or sources and clips, failed unexpectedly: by their names, the first ones."""
    failed = getattr(result, "failed", 0)
    if isinstance(failed, Mapping):
        return {id: printable(why) for id, why in list(failed.items())[:MAX_FAILED]}
    if not failed:
        return {}
    from pusa.data.reader import Table

    try:
        rows = Table.open(result.table).read("rejects").to_pylist()
    except (PusaError, OSError) as error:
        log.warning("the notice names no failures: %s", first_line(error))
        return {}
    rows = [row for row in rows if row["reason"] == Reason.FAILED]
    return {printable(row["source"]): printable(row["detail"]) for row in rows[:MAX_FAILED]}


def _link() -> str | None:
    """Return the page of this flow run in the dashboard of a lasting server; None without one."""
    if "prefect" not in sys.modules:
        return None
    from prefect.runtime import flow_run
    from prefect.settings import PREFECT_API_URL

    return flow_run.ui_url if PREFECT_API_URL.value() and flow_run.id else None
