"""Follow a run on a server in the terminal, and in the files of its folder where this machine has it."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import monotonic

import httpx
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import LogFilter, TaskRunFilter
from prefect.client.schemas.objects import FlowRun, Log
from prefect.client.schemas.sorting import LogSort
from prefect.exceptions import ObjectNotFound

from flows.console import redraw, show
from flows.runs import describe_state, exit_code, is_final, will_be_taken_up, with_inner
from pusa.errors import MediaError, PusaError
from pusa.generate.status import StatusReader
from pusa.generate.summary import Status
from pusa.system.text import first_line, printable

VIDEO_FLOWS = ("generate", "pipeline")
LOG_LINES = 8  # that a terminal shows
MOST_LINES = 200  # of one answer
TAKE_UP = timedelta(minutes=3)  # for a worker to take up a run that has crashed


class _Server:
    """What the server last said about a run."""

    def __init__(self, client: SyncPrefectClient, run: FlowRun) -> None:
        self.client, self.run, self.away = client, run, ""
        self.since = monotonic()  # when the server last answered
        self._last: datetime | None = None
        self._seen: set[object] = set()
        self._steps: dict[object, str] = {}  # the names of task runs, by id
        self.logs: list[str] = []  # those that are new

    def ask(self) -> None:
        """Read the run and its new log lines.

        Raises:
            PusaError: the run was deleted.
        """
        self.logs = []
        try:
            run = self.client.read_flow_run(self.run.id)
            ids = [each.id for each in with_inner(self.client, run)]
            which = LogFilter.model_validate({"flow_run_id": {"any_": ids}, "timestamp": {"after_": self._last}})
            first = self._last is None
            order = LogSort.TIMESTAMP_DESC if first else LogSort.TIMESTAMP_ASC
            logs = self.client.read_logs(which, limit=LOG_LINES if first else MOST_LINES, sort=order)
            self._name_steps(logs)
        except ObjectNotFound as error:
            raise PusaError(f"{self.run.name} was deleted on the server") from error
        except httpx.HTTPError as error:
            self.away = f"the server has not answered for {monotonic() - self.since:.0f} s ({first_line(error)})"
            return
        self.run, self.away, self.since = run, "", monotonic()
        new = [line for line in sorted(logs, key=lambda line: line.timestamp) if line.id not in self._seen]
        self._seen |= {line.id for line in new}
        self._last = new[-1].timestamp if new else self._last
        self.logs = [self._log_line(line) for line in new]

    def _name_steps(self, logs: Sequence[Log]) -> None:
        """Read the names of the task runs that wrote these lines: many lines say only that a state was reached."""
        ids = {line.task_run_id for line in logs if line.task_run_id} - self._steps.keys()
        if ids:
            which = TaskRunFilter.model_validate({"id": {"any_": sorted(ids)}})
            self._steps |= {each.id: f"{each.name}: " for each in self.client.read_task_runs(task_run_filter=which)}

    def _log_line(self, line: Log) -> str:
        step = self._steps.get(line.task_run_id, "")
        return f"{line.timestamp.astimezone():%H:%M:%S} {printable(step + line.message.rstrip())}"

    @property
    def ended(self) -> bool:
        """Return whether the run has ended for good."""
        if not is_final(self.run) or self.away:
            return False
        since = self.run.state.timestamp if self.run.state else datetime.now(UTC)
        return not will_be_taken_up(self.run) or datetime.now(UTC) - since > TAKE_UP


def follow(client: SyncPrefectClient, run: FlowRun, on_terminal: bool, pause: Callable[[], None]) -> int:
    """Show a run until it ends, and return its exit code.

    On a terminal the state, the jobs and the last log lines replace the earlier ones. Elsewhere new lines are printed.
    While the server does not answer, the files of the run's folder are followed on, up to the last job.

    Args:
        client: of the run's server.
        run: the run.
        on_terminal: whether lines can be replaced.
        pause: waits between looks.

    Raises:
        PusaError: the run was deleted.
    """
    server, reader = _Server(client, run), _reader(client, run)
    drawn, tail, last = 0, list[str](), ("", "")
    while True:
        server.ask()
        status = _status(reader)
        tail = [*tail, *server.logs][-LOG_LINES:]
        head = f"{server.run.name}: {describe_state(server.run)}"
        if on_terminal:
            lines = [head, *([f"{server.away}; last seen is"] if server.away else [])]
            drawn = redraw([*lines, *(status.lines() if status else []), *tail], drawn)
        else:
            now = (server.away and "the server does not answer; following the files") or head, _summary(status)
            for text in [*server.logs, *(text for text, before in zip(now, last, strict=True) if text != before)]:
                show(text)
            last = now
        if server.ended:
            return exit_code(server.run)
        if server.away and status is not None and status.ended:
            show("all jobs are done or have failed; the server does not answer, so the run's own end is unknown")
            return 3 if status.failed else 0
        pause()


def _reader(client: SyncPrefectClient, run: FlowRun) -> StatusReader | None:
    """Return what reads the status of a run's videos, if it makes any and this machine has the folder."""
    run_dir = run.parameters.get("run_dir")
    if not isinstance(run_dir, str):
        return None
    try:
        flow = client.read_flow(run.flow_id).name  # the run's parameters are only those that were given
    except (httpx.HTTPError, ObjectNotFound):
        return None
    return StatusReader(Path(run_dir) / "videos") if flow in VIDEO_FLOWS else None


def _status(reader: StatusReader | None) -> Status | None:
    """Return the status of the videos; None if there is none yet, or it cannot be read."""
    if reader is None:
        return None
    try:
        return reader.read()
    except (MediaError, OSError):
        return None


def _summary(status: Status | None) -> str:
    return status.summary() if status else ""
