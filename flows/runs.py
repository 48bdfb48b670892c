"""Ask a standing server of Prefect for flow runs: connect, find the run that is meant, and end it."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from time import monotonic, sleep
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterName,
    FlowRunFilterParentFlowRunId,
)
from prefect.client.schemas.objects import FlowRun, StateType, WorkerStatus
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL
from prefect.states import Cancelled, Cancelling, Crashed

from flows.server import require_server
from flows.settings import WITHOUT
from flows.states import NO_HEARTBEAT, WITH_FAILURES
from flows.watch import client_that_asks_once
from pusa.errors import PartlyFailed, PusaError
from pusa.system.processes import is_running
from pusa.system.text import MAX_LISTED, first_line, preview

WORKER = "prefect.worker.name"  # the label of a run with the name of its worker; Prefect shows it too
TAKEN_UP = "pusa.taken_up"  # the label that counts how often a crashed run was started again
MOST_TIMES = 3
GIVEN_UP = "given up: "  # how the message of a Crashed state begins that no worker takes up
LATEST = 200  # runs, the latest ones, of which a part of an id is enough
SHORTEST = 4  # characters of an id; it begins with the time, so its end tells runs of one minute apart
LOOK_SECONDS = 0.5  # between looks at a run that is being cancelled
CANCEL_SECONDS = 45.0  # for a worker to notice, and for the run's processes to end
UUID_FORM = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
ALIVE = (StateType.PENDING, StateType.RUNNING, StateType.CANCELLING)
CODES = {StateType.COMPLETED: 0, StateType.CANCELLED: 130}  # and 1


@contextmanager
def connected() -> Iterator[SyncPrefectClient]:
    """Yield a client of the server of PREFECT_API_URL, which answers. Its requests are not repeated.

    Raises:
        PusaError: no server is named, it does not answer, or it fails at a request of the context.
    """
    if not PREFECT_API_URL.value():
        raise PusaError(
            "no server is named: start one with `pusa server`, and set PREFECT_API_URL to the address that it prints"
        )
    try:
        server = require_server()
    except PusaError as error:
        raise PusaError(str(error).removesuffix(f", {WITHOUT}")) from error
    with client_that_asks_once() as client:
        try:
            yield client
        except httpx.HTTPError as error:  # such as 503, of SQLite with too many writers
            problem = first_line(error).partition(" - Response:")[0]
            raise PusaError(f"{server} did not do what it was asked: {problem}; try again") from error


def find_run(client: SyncPrefectClient, name: str | None) -> FlowRun:
    """Return the run of a link, an id, a part of an id, or a name; without one, the latest run.

    Of several runs with a name, those that have not ended count, and the latest if all have.

    Raises:
        PusaError: there is none, or there are several.
    """
    if name is None:
        latest = _latest(client, limit=1)
        if not latest:
            raise PusaError("the server has no runs yet; start one with `pusa submit`")
        return latest[0]
    if ids := [match[0] for match in UUID_FORM.finditer(name)]:
        try:
            return client.read_flow_run(UUID(ids[-1]))
        except ObjectNotFound as error:
            raise PusaError(f"the server has no run {ids[-1]}; was it deleted, or is it on another server?") from error
    found = _latest(client, name)
    found = [run for run in found if not is_final(run)] or found[:1]
    if not found and len(name) >= SHORTEST:
        found = [run for run in _latest(client) if name.lower() in str(run.id)]
        found = found or [run for run in _ahead(client) if name.lower() in str(run.id)]
    if not found:
        raise PusaError(
            f"{preview(name)} is not a run; expected the link that `pusa submit` prints, the id of a run, "
            f"{SHORTEST} or more characters of it, or its name"
        )
    if len(found) > 1:
        shown = ", ".join(f"{run.id} ({run.name})" for run in found[:MAX_LISTED])
        raise PusaError(f"{preview(name)} can be {len(found)} runs: {shown}; name one by its id")
    return found[0]


def _latest(client: SyncPrefectClient, named: str | None = None, limit: int = LATEST) -> list[FlowRun]:
    """Return runs, the latest first. Without a name only those that are due: a schedule has runs ahead, for days."""
    due = FlowRunFilterExpectedStartTime(before_=datetime.now(UTC) + timedelta(minutes=1))
    which = (
        FlowRunFilter(name=FlowRunFilterName(any_=[named]))
        if named is not None
        else FlowRunFilter(expected_start_time=due)
    )
    order = FlowRunSort.EXPECTED_START_TIME_DESC
    return client.read_flow_runs(flow_run_filter=which, sort=order, limit=limit)


def _ahead(client: SyncPrefectClient) -> list[FlowRun]:
    """Return runs that are not due yet, such as those of `pusa submit --at`, the next one first."""
    later = FlowRunFilterExpectedStartTime(after_=datetime.now(UTC) + timedelta(minutes=1))
    which, order = FlowRunFilter(expected_start_time=later), FlowRunSort.EXPECTED_START_TIME_ASC
    return client.read_flow_runs(flow_run_filter=which, sort=order, limit=LATEST)


def with_inner(client: SyncPrefectClient, run: FlowRun) -> list[FlowRun]:
    """Return a run and the runs of the stages in it, if it is a pipeline."""
    parent = FlowRunFilterParentFlowRunId(any_=[run.id])
    return [run, *client.read_flow_runs(flow_run_filter=FlowRunFilter(parent_flow_run_id=parent))]


def is_final(run: FlowRun) -> bool:
    """Return whether a run has ended."""
    return run.state is not None and run.state.is_final()


def describe_state(run: FlowRun) -> str:
    """Return the name of a run's state, with its message."""
    if run.state is None:
        return "without a state"
    return f"{run.state.name}: {run.state.message}" if run.state.message else str(run.state.name)


def exit_code(run: FlowRun) -> int:
    """Return the exit code for how a run ended: 0, 3 if a part of it failed, 130 if it was cancelled, else 1."""
    if run.state is not None and run.state.name == WITH_FAILURES:
        return 3
    return CODES.get(run.state.type, 1) if run.state is not None else 1


def will_be_taken_up(run: FlowRun) -> bool:
    """Return whether a worker will start this crashed run again."""
    crashed = run.state is not None and run.state.is_crashed() and run.deployment_id is not None
    return crashed and not str(run.state.message).startswith(GIVEN_UP)  # type: ignore[union-attr]


def is_silent(run: FlowRun) -> bool:
    """Return whether a run is Crashed for want of heartbeats: it died, or its server stood still and missed them."""
    return run.state is not None and run.state.is_crashed() and str(run.state.message).startswith(NO_HEARTBEAT)


def times_taken_up(run: FlowRun) -> int:
    """Return how often a run was started again after it had crashed. A submitter may have written anything there."""
    count = run.labels.get(TAKEN_UP)
    return max(0, count) if isinstance(count, int) else 0


def mark_cancelled(client: SyncPrefectClient, run: FlowRun, message: str) -> None:
    """Set a run, and the stages in it, to Cancelled, whatever their states are. Nothing is ended by this."""
    for each in with_inner(client, run):
        if each.id == run.id or not is_final(each):
            client.set_flow_run_state(each.id, Cancelled(message=message), force=True)


def mark_crashed(client: SyncPrefectClient, run: FlowRun, message: str) -> None:
    """Set a run, and the stages in it that have not ended, to Crashed: some worker takes the run up again."""
    for each in with_inner(client, run):
        if each.id == run.id or not is_final(each):
            client.set_flow_run_state(each.id, Crashed(message=message))


def cancel(client: SyncPrefectClient, run: FlowRun, wait: Callable[[], None] = lambda: sleep(LOOK_SECONDS)) -> str:
    """Cancel a run, wait until its processes have ended, and return a sentence about it.

    Args:
        client: of the run's server.
        run: the run.
        wait: waits between looks at the run.

    Raises:
        PusaError: it has ended already, or nobody ended it and it cannot be known whether it runs.
        PartlyFailed: it ended otherwise meanwhile.
    """
    if is_final(run) and not will_be_taken_up(run):
        raise PusaError(f"{run.name} has ended: {describe_state(run)}")
    if is_final(run) or run.state is None or run.state.is_scheduled():
        mark_cancelled(client, run, "cancelled before it was started")
        return f"{run.name} is cancelled; it was not running"
    client.set_flow_run_state(run.id, Cancelling())
    deadline = monotonic() + CANCEL_SECONDS
    while monotonic() < deadline:
        try:
            run = client.read_flow_run(run.id)
        except ObjectNotFound as error:
            raise PusaError(f"{run.name} was deleted on the server while it was being cancelled") from error
        if is_final(run):
            break
        if run.infrastructure_pid and is_running(run.infrastructure_pid) is False:
            deadline = min(deadline, monotonic() + 10 * LOOK_SECONDS)  # its worker may be about to say so itself
        wait()
    if run.state is not None and run.state.is_cancelled():
        return f"{run.name} is cancelled: {run.state.message}"
    if is_final(run):
        raise PartlyFailed(f"{run.name} ended before it could be cancelled: {describe_state(run)}")
    gone = _why_gone(client, run)
    mark_cancelled(client, run, gone)
    return f"{run.name} is cancelled: {gone}"


def _why_gone(client: SyncPrefectClient, run: FlowRun) -> str:
    """Return why nothing of a run can be running any more.

    Raises:
        PusaError: something may.
    """
    alive = is_running(run.infrastructure_pid) if run.infrastructure_pid else None
    if alive is False:
        return "its process had ended before"
    if alive:
        process = run.infrastructure_pid.split(":")[3] if run.infrastructure_pid else ""
        raise PusaError(
            f"{run.name} is still {describe_state(run)} after {CANCEL_SECONDS:.0f} s, and its process {process} runs "
            "on this machine: it may be stopped or wait for a disk; end it, then cancel again"
        )
    name = run.labels.get(WORKER)
    if name is None:
        raise PusaError(
            f"nothing answered for {run.name} within {CANCEL_SECONDS:.0f} s; it was not started by a worker, so look "
            "for its process on the machine where it was started, and cancel it there"
        )
    workers: Sequence[object] = ()
    if run.work_pool_name:
        found = client.read_workers_for_work_pool(run.work_pool_name)
        workers = [worker for worker in found if worker.name == name and worker.status == WorkerStatus.ONLINE]
    if workers:
        raise PusaError(
            f"{run.name} is still {describe_state(run)} after {CANCEL_SECONDS:.0f} s, though its worker {name!r} sends "
            "heartbeats; read that worker's log"
        )
    return f"its worker {name!r} is gone, and its processes with it"
