"""Serve a work pool of Prefect: start the runs that are due, each in a process, and settle how they end.

Prefect's own worker runs the command that a deployment or a submitter names, leaves its runs "Running" when it is
ended, and gives up when the server is away for some time. This one runs Pusa's flows and nothing else. It needs the
server's public API alone.

Who owns a run is decided by the server: it grants the state Pending once, also for a run that has crashed. The message
of that state, and then a label of the run, name its worker, and its `infrastructure_pid` its process: by these a worker
finds the runs of its predecessor.
"""

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from threading import Event
from time import monotonic
from types import FrameType
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterEndTime,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateName,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import FlowRun, State
from prefect.client.schemas.responses import SetStateStatus
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound
from prefect.states import AwaitingRetry, Crashed, Failed, Pending, Running

from flows.admission import require_own_flow
from flows.console import print_error
from flows.flow_run import SERVER_LOST
from flows.run_process import GRACE_SECONDS, Started
from flows.runs import (
    ALIVE,
    GIVEN_UP,
    MOST_TIMES,
    TAKEN_UP,
    WORKER,
    is_final,
    is_silent,
    mark_cancelled,
    mark_crashed,
    times_taken_up,
    will_be_taken_up,
    with_inner,
)
from pusa.errors import PusaError
from pusa.system.processes import identity, is_running
from pusa.system.text import first_line, preview

log = logging.getLogger("pusa.worker")
POLL_SECONDS = 2.0  # between questions to the server
HEARTBEAT_SECONDS = 30.0  # between heartbeats, and between looks for runs that crashed
REPORT_SECONDS = 60.0  # for a process to end after its run has
OBJECTION = timedelta(seconds=20)  # for the worker of a run without heartbeats to say that its process lives
RECENT = timedelta(days=1)  # a run that crashed before is left alone
LONGEST_START = timedelta(minutes=10)  # between Pending and Running; a worker that dies then has left no other trace
MOST_RUNS = 200  # of one answer


@dataclass
class Worker:
    """A worker of a pool. `serve` returns when a signal has stopped it.

    Attributes:
        client: of the server; it does not repeat requests.
        name: the worker's name; no other worker of the pool has it.
        pool: the work pool's name.
        limit: how many runs it does at once.
        environment: of the runs' processes.
    """

    client: SyncPrefectClient
    name: str
    pool: str
    limit: int
    environment: Mapping[str, str]
    started: dict[UUID, Started] = field(default_factory=dict)
    stopped_by: int | None = None  # the number of the signal
    returned: int = 0  # the runs that were put back
    revived: set[UUID] = field(default_factory=set)  # those whose next crash follows from one that was none
    _wake: Event = field(default_factory=Event)
    _next_heartbeat: float = 0.0
    _lost_since: float | None = None

    @property
    def server(self) -> str:
        """Return the server's address, without a password."""
        return str(self.client.api_url.copy_with(userinfo=b""))

    @property
    def _mark(self) -> str:
        return f"taken by worker {self.name!r}"

    def serve(self) -> None:
        """Serve the pool until SIGTERM or Ctrl-C, then end the runs and put them back. A second signal ends at once."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        while self.stopped_by is None:
            self._try(self._turn)
            self._wake.wait(POLL_SECONDS)
        self._end()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.stopped_by is not None:
            for started in self.started.values():
                started.kill()
            os._exit(128 + number)
        self.stopped_by = number
        self._wake.set()

    def _try(self, step: Callable[[], None]) -> bool:
        """Take a step and return whether the server answered. It is missed once and welcomed back once."""
        try:
            step()
        except httpx.HTTPError as error:
            if self._lost_since is None:
                self._lost_since = monotonic()
                problem = f"does not answer ({first_line(error)})"
                if isinstance(error, httpx.HTTPStatusError):
                    problem = f"answers with the error HTTP {error.response.status_code}"
                log.warning("%s %s; waiting for it, runs go on", self.server, problem)
            return False
        except ObjectNotFound as error:  # a run or the pool was deleted between two requests
            log.warning("the server has lost something: %s", first_line(error))
            return False
        if self._lost_since is not None:
            log.info("%s answers again, after %.0f s", self.server, monotonic() - self._lost_since)
            self._lost_since = None
        return True

    def _turn(self) -> None:
        """Do what is to be done now."""
        self._settle()
        self._follow()
        crashed: list[FlowRun] | None = None  # not asked for
        if monotonic() >= self._next_heartbeat:
            self.client.send_worker_heartbeat(self.pool, self.name, HEARTBEAT_SECONDS)
            self._report_dead()
            crashed = list(self._crashed())
            self._next_heartbeat = monotonic() + HEARTBEAT_SECONDS
        if len(self.started) >= self.limit:
            return
        due = self.client.get_scheduled_flow_runs_for_work_pool(self.pool, scheduled_before=datetime.now(UTC))
        if crashed is None:  # of a long queue, one would take each place between two heartbeats
            crashed = list(self._crashed()) if due else []
        for run in [*crashed, *(response.flow_run for response in due)]:
            if len(self.started) < self.limit and self.stopped_by is None:
                try:
                    self._start(run)
                except httpx.HTTPStatusError as error:
                    if error.response.is_server_error:
                        raise
                    log.warning("%s cannot be started: %s", run.name, first_line(error))  # others can

    # Runs that begin.

    def _start(self, run: FlowRun) -> None:
        """Take a run if the server grants it, and start its process."""
        again = bool(run.state and run.state.is_crashed())
        if self.client.set_flow_run_state(run.id, Pending(message=self._mark)).status != SetStateStatus.ACCEPT:
            return  # another worker was first, or the deployment has as many runs as it may have
        labels: dict[str, Any] = {WORKER: self.name}
        if again and self._counts(run):
            labels[TAKEN_UP] = times_taken_up(run) + 1
            log.info("%s has crashed and is taken up again (%s of %s)", run.name, labels[TAKEN_UP], MOST_TIMES)
        elif again:
            log.info("%s was well when the server lost sight of it, and is taken up again", run.name)
        self.revived.discard(run.id)
        self.client.update_flow_run_labels(run.id, labels)
        try:
            flow = self._flow_of(run)
        except PusaError as error:
            log.warning("%s is refused: %s", run.name, error)
            self.client.set_flow_run_state(run.id, Failed(message=f"refused: {error}"), force=True)
            return
        self.started[run.id] = started = Started.begin(run, flow, self.environment)
        log.info("started %s (%s), as process %s", run.name, run.id, started.process.pid)
        if sys.platform == "linux":
            self.client.update_flow_run(run.id, infrastructure_pid=identity(started.process.pid))

    def _flow_of(self, run: FlowRun) -> str:
        """Return the name of the flow of a run.

        Raises:
            PusaError: its deployment is missing, or runs other code.
        """
        if run.deployment_id is None:
            raise PusaError("it belongs to no deployment; submit it with `pusa submit`")
        try:
            deployment = self.client.read_deployment(run.deployment_id)
        except ObjectNotFound as error:
            raise PusaError("its deployment was deleted; make it again with `pusa deploy`") from error
        flow = require_own_flow(deployment)
        given = {name for variables in (deployment.job_variables, run.job_variables) for name in variables or {}}
        if given:
            log.warning("%s: the job variables %s are ignored", run.name, ", ".join(map(preview, sorted(given))))
        return flow

    # Runs that are under way.

    def _settle(self) -> None:
        """Set the states of the runs whose processes have ended, where they did not do so themselves."""
        for id, started in list(self.started.items()):
            code = started.process.poll()
            if code is None:
                continue
            try:
                run = self.client.read_flow_run(id)
            except ObjectNotFound:
                log.warning("%s was deleted", started.run.name)
            else:
                self._settle_one(run, code)
            del self.started[id]  # not earlier: if the server does not answer, this is tried again

    def _settle_one(self, run: FlowRun, code: int) -> None:
        was_put_back = code == SERVER_LOST or self.stopped_by is not None
        if not self._is_ours(run) and not (was_put_back and self._is_silent_and_ours(run)):
            pass
        elif run.state is not None and run.state.is_cancelling():
            mark_cancelled(self.client, run, f"cancelled; worker {self.name!r} has ended its processes")
        elif was_put_back:
            self._put_back(run)
            return
        else:
            ending = f"signal {-code}" if code < 0 else f"exit code {code}"
            self._report_crash(run, f"its process on worker {self.name!r} ended with {ending}")
            return
        log.info("%s has ended", run.name)

    def _is_ours(self, run: FlowRun) -> bool:
        """Return whether the server counts on this worker for a run."""
        if run.state is None or run.state.type not in ALIVE:
            return False
        return run.state.message == self._mark if run.state.is_pending() else run.labels.get(WORKER) == self.name

    def _is_silent_and_ours(self, run: FlowRun) -> bool:
        return is_silent(run) and run.labels.get(WORKER) == self.name

    def _follow(self) -> None:
        """End the processes of runs that are being cancelled, were deleted, or have another worker now."""
        if not self.started:
            return
        ids = FlowRunFilter(id=FlowRunFilterId(any_=list(self.started)))
        runs = {run.id: run for run in self.client.read_flow_runs(flow_run_filter=ids, limit=MOST_RUNS)}
        for id, started in self.started.items():
            run = runs.get(id)
            if run is not None and started.kill_at is None and self._is_silent_and_ours(run):
                started.is_reviving = True
            if run is not None and started.is_reviving:
                self._revive(started, run)
                continue
            if run is None or run.state is None or not run.state.is_final():
                started.final_since = None
                if run is None or not self._is_ours(run) or run.state is None or run.state.is_cancelling():
                    started.stop()
                continue
            started.final_since = started.final_since or monotonic()
            reported = run.state.is_completed() or run.state.is_failed()  # by the process itself, which ends soon
            if not reported or monotonic() - started.final_since > REPORT_SECONDS:
                started.stop()

    def _revive(self, started: Started, run: FlowRun) -> None:
        """Set a run, whose process lives, and the stages in it back to Running: their server stood still.

        The run asks for Pending first, which the server grants once: another worker may have been granted it. It comes
        with a new place of its deployment's limit. Prefect's engine keeps on renewing the place that it lost, and ends
        the run when it cannot; that crash does not count either.
        """
        if is_silent(run):
            pending: State[None] = Pending(message=self._mark)
            if self.client.set_flow_run_state(run.id, pending).status != SetStateStatus.ACCEPT:
                started.is_reviving = False  # the next look says whose it is
                return
        message = f"its process on worker {self.name!r} lives; the server had missed its heartbeats"
        if is_silent(run) or (run.state is not None and run.state.message == self._mark):
            self.client.set_flow_run_state(run.id, Running(message=message))
        for inner in with_inner(self.client, run)[1:]:
            if is_silent(inner):
                self.client.set_flow_run_state(inner.id, Running(message=message), force=True)
        started.is_reviving = False
        self.revived.add(run.id)
        log.info("%s was marked as crashed, but its process lives: it is running again", run.name)

    # Runs whose worker or process has died.

    def _report_dead(self) -> None:
        """Report the runs of an earlier worker of this name whose processes are dead."""
        for run in self._runs_of_pool(FlowRunFilterState(type=FlowRunFilterStateType(any_=list(ALIVE)))):
            if run.id in self.started:
                continue
            if run.state and run.state.is_pending() and run.state.timestamp < datetime.now(UTC) - LONGEST_START:
                self._report_crash(run, f"it did not begin within {LONGEST_START.seconds // 60} minutes")
                continue
            if not self._is_ours(run):
                continue
            begun = run.state is not None and not run.state.is_pending()
            if begun and run.infrastructure_pid and is_running(run.infrastructure_pid) is not False:
                continue  # on another machine its heartbeats tell
            if run.state is not None and run.state.is_cancelling():
                mark_cancelled(self.client, run, f"its worker {self.name!r} had ended, and its processes with it")
            else:
                self._report_crash(run, f"its worker {self.name!r} {'died' if begun else 'did not get to start it'}")

    def _report_crash(self, run: FlowRun, problem: str) -> None:
        """Set a run to Crashed, and look soon for runs that can be taken up."""
        log.warning("%s has crashed: %s", run.name, problem)
        mark_crashed(self.client, run, problem)
        self._next_heartbeat = min(self._next_heartbeat, monotonic() + POLL_SECONDS)

    def _crashed(self) -> Iterator[FlowRun]:
        """Yield the runs of the pool that crashed and can be taken up. One that did so too often is given up."""
        state = FlowRunFilterState(name=FlowRunFilterStateName(any_=["Crashed"]))
        since = FlowRunFilterEndTime(after_=datetime.now(UTC) - RECENT)
        for run in self._runs_of_pool(state, end_time=since):
            if not will_be_taken_up(run) or run.id in self.started:
                continue
            is_new = run.state is not None and datetime.now(UTC) - run.state.timestamp < OBJECTION
            if is_new and is_silent(run) and run.labels.get(WORKER) != self.name:
                continue
            if times_taken_up(run) < MOST_TIMES or not self._counts(run):
                yield run
                continue
            message = (
                f"{GIVEN_UP}it crashed {MOST_TIMES + 1} times, the last time because "
                f"{run.state and run.state.message}; read its log, then retry it"
            )
            log.warning("%s is %s", run.name, message)
            self.client.set_flow_run_state(run.id, Crashed(message=message), force=True)

    def _counts(self, run: FlowRun) -> bool:
        """Return whether a crash is one of the few after which a run is given up: not if no process of it died."""
        if run.id in self.revived:
            return False
        if not is_silent(run):
            return True
        earlier = sorted(self.client.read_flow_run_states(run.id), key=lambda state: state.timestamp)[:-1]
        return not (earlier and earlier[-1].is_scheduled())  # put back, and then marked for want of heartbeats

    def _runs_of_pool(self, state: FlowRunFilterState, **more: Any) -> list[FlowRun]:
        return self.client.read_flow_runs(
            flow_run_filter=FlowRunFilter(state=state, **more),
            work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[self.pool])),
            sort=FlowRunSort.EXPECTED_START_TIME_DESC,
            limit=MOST_RUNS,
        )

    # The end.

    def _end(self) -> None:
        """End the runs' processes, and put the runs back."""
        if self.started:
            log.info("ending %d %s", len(self.started), "run" if len(self.started) == 1 else "runs")
        while any(started.process.poll() is None for started in self.started.values()):
            for started in self.started.values():
                started.stop()
            Event().wait(0.1)
        self._wake.clear()
        deadline = monotonic() + GRACE_SECONDS
        while not self._try(self._settle) and monotonic() < deadline:
            self._wake.wait(POLL_SECONDS)
        if self.started:
            names = ", ".join(started.run.name for started in self.started.values())
            print_error(
                f"{self.server} does not answer, so these runs were not put back: {names}; start the worker again"
            )

    def _put_back(self, run: FlowRun) -> None:
        """Set a run to AwaitingRetry, so that a worker starts it again; without a process, the server can cancel it."""
        self.client.request("PATCH", "/flow_runs/{id}", path_params={"id": run.id}, json={"infrastructure_pid": ""})
        why = "the server was lost" if self.stopped_by is None else f"worker {self.name!r} was ended"
        for inner in with_inner(self.client, run)[1:]:
            if not is_final(inner):
                self.client.set_flow_run_state(inner.id, Crashed(message=why))
        state: State[None] = AwaitingRetry(
            scheduled_time=datetime.now(UTC), message=f"{why}; the run goes on where it was"
        )
        self.client.set_flow_run_state(run.id, state, force=True)
        self.returned += self.stopped_by is not None
        log.info("%s is put back: %s", run.name, why)
