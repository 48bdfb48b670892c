"""Checks of the server of PREFECT_API_URL: its version and database, its workers, and what it waits for in vain."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from uuid import UUID

import prefect
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterState,
    FlowRunFilterStateName,
    FlowRunFilterStateType,
    TaskRunFilter,
    TaskRunFilterId,
)
from prefect.client.schemas.objects import FlowRun, StateType, WorkerStatus
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectNotFound

from flows.deployments import POOL, SILENT_SECONDS
from flows.doctor.findings import Check, Finding, note, ok, problem
from flows.runs import ALIVE, WORKER, is_final, mark_crashed
from pusa.system.processes import is_running
from pusa.system.text import MAX_LISTED, printable

HEARTBEAT = "prefect.flow-run.heartbeat"
PLANNED_WITHIN = timedelta(minutes=3)  # of a schedule's making; the scheduler's turn comes each minute
MOST = 200  # of one answer
SETTLED_SECONDS = 1.0  # between two looks at slots: one that is being taken is counted before it has a holder
GPU = "gpu"  # the tag


def service_checks(client: SyncPrefectClient) -> dict[str, Check]:
    """Return the checks by their names."""
    checks: Mapping[str, Callable[[SyncPrefectClient], Iterator[Finding]]] = {
        "server": check_server,
        "workers": check_workers,
        "deployments": check_deployments,
        "late runs": check_late_runs,
        "runs under way": check_runs,
        "gpu slots": check_gpu_slots,
        "deployment slots": check_deployment_slots,
    }
    return {name: partial(check, client) for name, check in checks.items()}


def check_server(client: SyncPrefectClient) -> Iterator[Finding]:
    """Ask for the server's version and for its database."""
    theirs, ours = client.api_version(), prefect.__version__
    if theirs == ours:
        yield ok(f"{client.api_url} answers, Prefect {theirs}")
    else:
        yield note(f"{client.api_url} is Prefect {theirs}, and this is {ours}", "install the same version on both")
    answer = client._client.get("/ready")  # it asks the database
    if answer.is_success:
        yield ok("its database answers")
    else:
        yield problem(f"its database does not answer (HTTP {answer.status_code})", "start the database")


def check_workers(client: SyncPrefectClient) -> Iterator[Finding]:
    """Look for the work pool and its workers."""
    try:
        client.read_work_pool(POOL)
    except ObjectNotFound:
        yield note(f"the server has no work pool {POOL!r}, so nothing can be submitted", "run pusa deploy")
        return
    workers = client.read_workers_for_work_pool(POOL, limit=MOST)
    online = sorted(worker.name for worker in workers if worker.status == WorkerStatus.ONLINE)
    gone = len(workers) - len(online)
    earlier = f"; {gone} earlier ones are offline" if gone else ""
    if online:
        yield ok(f"{len(online)} online: {_some(online)}{earlier}")
    else:
        yield note(f"none is online{earlier}: what is submitted waits", "start one: pusa worker")


def check_deployments(client: SyncPrefectClient) -> Iterator[Finding]:
    """Look for active schedules of which the server has planned no run."""
    deployments = client.read_deployments(limit=MOST)
    if not deployments:
        yield note("nothing is deployed", "run pusa deploy")
        return
    active = [each for each in deployments if not each.paused and any(plan.active for plan in each.schedules)]
    now, unplanned = datetime.now(UTC), []
    for each in active:
        scheduled = FlowRunFilter(
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])),
            deployment_id=FlowRunFilterDeploymentId(any_=[each.id]),
        )
        changed = each.updated or each.created
        if not (changed and now - changed < PLANNED_WITHIN) and not client.read_flow_runs(
            flow_run_filter=scheduled, limit=1
        ):
            unplanned.append(each.name)
    for name in unplanned:
        yield problem(
            f"the schedule of {printable(name)} is active, and no run of it is planned",
            "look for errors of the scheduler in the server's output; see packages",
        )
    if not unplanned:
        yield ok(f"{len(deployments)}, of which {len(active)} have an active schedule with runs planned")


def check_late_runs(client: SyncPrefectClient) -> Iterator[Finding]:
    """Look for runs whose time has passed and that no worker has taken."""
    late = _runs(client, FlowRunFilterState(name=FlowRunFilterStateName(any_=["Late"])))
    if not late:
        yield ok("there are none")
        return
    oldest = min(run.expected_start_time for run in late if run.expected_start_time)
    hours = (datetime.now(UTC) - oldest).total_seconds() / 3600
    text = f"{len(late)}, the oldest is {hours:.1f} h late: {_some([run.name for run in late])}"
    yield problem(text, "start a worker (pusa worker), or wait for the runs before them")


def check_runs(client: SyncPrefectClient) -> Iterator[Finding]:
    """Look for runs that count as running, but whose process is dead or has sent no heartbeat."""
    running = _runs(client, FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING])))
    now, silent = datetime.now(UTC), timedelta(seconds=SILENT_SECONDS)
    heard = _heartbeats(client, now - silent) if running else set()
    well = 0
    for run in running:
        begun = run.state.timestamp if run.state else now
        lives = is_running(run.infrastructure_pid) if run.infrastructure_pid else None
        where = f"{printable(run.name)} ({run.id}) of {printable(run.labels.get(WORKER) or 'no worker')}"
        if lives is False:
            yield problem(
                f"{where} counts as running, and its process is dead",
                "start its worker again, or pusa doctor --repair: it is marked as crashed, and its work is kept",
                partial(_mark_crashed, client, run),
            )
        elif lives is None and f"prefect.flow-run.{run.id}" not in heard and now - begun > silent:
            yield problem(
                f"{where} counts as running, and has sent no heartbeat for {SILENT_SECONDS} s",
                "look at its machine; the automation of pusa deploy marks it as crashed",
            )
        else:
            well += 1
    if well or not running:
        yield ok(f"{well} with a living process")


def _mark_crashed(client: SyncPrefectClient, run: FlowRun) -> str:
    mark_crashed(client, run, "its process is dead (pusa doctor)")
    return "it is marked as crashed"


def _heartbeats(client: SyncPrefectClient, since: datetime) -> set[str]:
    """Return the resource ids of the runs that have sent a heartbeat."""
    criteria = {"occurred": {"since": since.isoformat()}, "event": {"name": [HEARTBEAT]}}
    answer = client._client.post("/events/filter", json={"filter": criteria, "limit": 50})
    answer.raise_for_status()
    page, seen = answer.json(), set[str]()
    while True:
        seen |= {event["resource"]["prefect.resource.id"] for event in page["events"]}
        if not page.get("next_page"):
            return seen
        page = client._client.get(page["next_page"]).raise_for_status().json()


def check_gpu_slots(client: SyncPrefectClient) -> Iterator[Finding]:
    """Look for slots of the limit on the tag "gpu" that runs hold which have ended, or that nobody holds."""
    try:
        limit = client.read_global_concurrency_limit_by_name(f"tag:{GPU}")
    except ObjectNotFound:
        yield note(
            f'the tag "{GPU}" has no limit; the locks of each machine hold', "pusa deploy --gpu-steps N sets one"
        )
        return
    holders = client.read_concurrency_limit_by_tag(GPU).active_slots
    ended = _ended_tasks(client, holders)
    for holder in ended:
        yield problem(
            f"a slot is held by task run {holder}, which has ended",
            "wait a minute, or pusa doctor --repair",
            partial(_free_holder, client, holder),
        )
    unheld = _unheld(lambda: _counted(client) - len(client.read_concurrency_limit_by_tag(GPU).active_slots))
    if unheld:
        yield problem(
            f"{unheld} of {limit.limit} slots are taken, and nobody holds them",
            "pusa doctor --repair",
            partial(_free, client, f"tag:{GPU}", unheld),
        )
    if not ended and not unheld:
        yield ok(f"{limit.active_slots} of {limit.limit} are taken")


def check_deployment_slots(client: SyncPrefectClient) -> Iterator[Finding]:
    """Look for slots of deployments that no run holds: their next runs would wait for ever."""
    limited = [each for each in client.read_deployments(limit=MOST) if each.global_concurrency_limit]
    leaked = 0
    for each in limited:
        unheld = _unheld(partial(_unheld_of, client, each.id))
        if unheld and (limit := each.global_concurrency_limit):
            leaked += 1
            yield problem(
                f"{unheld} of {limit.limit} slots of {printable(each.name)} are taken, and no run holds them",
                "pusa doctor --repair",
                partial(_free, client, limit.name, unheld),
            )
    if not leaked:
        yield ok(f"{len(limited)} deployments have a limit, and no run waits for one that has ended")


def _unheld(count: Callable[[], int]) -> int:
    """Return how many slots are taken without a holder, in each of two looks."""
    first = count()
    if first <= 0:
        return 0
    time.sleep(SETTLED_SECONDS)
    return max(0, min(first, count()))


def _counted(client: SyncPrefectClient) -> int:
    return client.read_global_concurrency_limit_by_name(f"tag:{GPU}").active_slots


def _unheld_of(client: SyncPrefectClient, deployment: UUID) -> int:
    alive = FlowRunFilter(
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(ALIVE))),
        deployment_id=FlowRunFilterDeploymentId(any_=[deployment]),
    )
    now: Sequence[DeploymentResponse] = client.read_deployments(
        deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployment]))
    )
    limit = now[0].global_concurrency_limit if now else None
    return limit.active_slots - len(client.read_flow_runs(flow_run_filter=alive, limit=MOST)) if limit else 0


def _ended_tasks(client: SyncPrefectClient, ids: Collection[UUID]) -> list[UUID]:
    """Return the task runs that have ended, or whose flow run has. One that has just begun may not be known yet."""
    among = TaskRunFilter(id=TaskRunFilterId(any_=[*ids]))
    ended = []
    for task in client.read_task_runs(task_run_filter=among) if ids else []:
        over = task.state is not None and task.state.is_final()
        if not over and task.flow_run_id:
            with suppress(ObjectNotFound):
                over = is_final(client.read_flow_run(task.flow_run_id))
        if over:
            ended.append(task.id)
    return ended


def _free_holder(client: SyncPrefectClient, holder: UUID) -> str:
    client.decrement_v1_concurrency_slots(names=[GPU], task_run_id=holder, occupancy_seconds=1).raise_for_status()
    return "it is free"


def _free(client: SyncPrefectClient, name: str, slots: int) -> str:
    client.release_concurrency_slots(names=[name], slots=slots, occupancy_seconds=1).raise_for_status()
    return f"{slots} are free"


def _runs(client: SyncPrefectClient, state: FlowRunFilterState) -> list[FlowRun]:
    return client.read_flow_runs(flow_run_filter=FlowRunFilter(state=state), limit=MOST)


def _some(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > MAX_LISTED else ""
    return ", ".join(map(printable, names[:MAX_LISTED])) + more
