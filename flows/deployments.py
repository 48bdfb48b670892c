"""Pusa's deployments: what they run, when, and after which events; and how a server gets them.

`deployments` describes them in the form of Prefect's prefect.yaml, so that `pusa deploy` and `prefect deploy` make the
same. infra/prefect.yaml is what `pusa deploy --print` prints.
"""

import importlib
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID
from zoneinfo import available_timezones

import httpx
import yaml
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import ConcurrencyLimitConfig, StateType
from prefect.deployments.runner import DeploymentApplyError, RunnerDeployment
from prefect.events import DeploymentEventTrigger
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectNotFound
from prefect.schedules import Schedule
from prefect.types.entrypoint import EntrypointType

from flows.events import CHECKPOINT_BEST, RUN, STAGE_ENDED
from flows.settings import HEARTBEAT_SECONDS
from flows.states import NO_HEARTBEAT, WITH_FAILURES
from pusa.errors import PusaError
from pusa.system.text import preview

POOL = "pusa"
ON_DEMAND, NIGHTLY, WEEKLY = "on-demand", "nightly", "weekly"
FLOWS = {
    "ingest": "an ingest manifest",
    "precompute": "a precompute manifest",
    "finetune": "a finetune manifest",
    "generate": "a generate manifest",
    "pipeline": "the manifests of the four stages, one after the other",
}
STAGES = tuple(FLOWS)[:-1]
WEEKDAYS = ("Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
CRON_FIELDS = 5
BANNED = "/%&<>"  # in the name of a deployment
HEARTBEAT = "Pusa: runs without a heartbeat have crashed"
SILENT_SECONDS = 3 * HEARTBEAT_SECONDS + 10
# A run in one of these states sends no heartbeats. Without its own name here, a run that ended would count as crashed.
AT_REST = (
    "Completed", WITH_FAILURES, "Failed", "Cancelled", "Crashed", "Scheduled", "Late", "AwaitingRetry",
    "AwaitingConcurrencySlot", "Paused", "Suspended",
)  # fmt: skip

HEADING = """\
# Pusa's deployments for `prefect deploy`. This file is what `pusa deploy --print` prints: do not edit it. With
# `pusa deploy --print FOLDER` you get one for your folder of manifests, and `pusa deploy FOLDER` needs no file.
#
#   prefect work-pool create pusa --type process
#   export PUSA_MANIFESTS=/absolute/folder/with/ingest.yaml/and/so/on PUSA_RUN_DIR=/absolute/folder/of/the/run
#   prefect --no-prompt deploy --all --prefect-file infra/prefect.yaml
#
# Once, `pusa deploy` must also make the automation that marks runs without a heartbeat as crashed.
"""

Deployment = dict[str, Any]  # as in a prefect.yaml


@dataclass(frozen=True)
class Times:
    """When the scheduled deployments run, as cron expressions in a time zone; not `active`: not until resumed.

    Raises:
        PusaError: one is not a cron expression of five fields.
    """

    timezone: str
    ingest: str
    finetune: str
    generate: str
    active: bool = True

    def __post_init__(self) -> None:
        for cron in (self.ingest, self.finetune, self.generate):
            try:
                if len(cron.split()) != CRON_FIELDS:  # Prefect takes @daily and seconds as well
                    raise ValueError
                Schedule(cron=cron)
            except ValueError as error:
                raise PusaError(
                    f"{cron!r} is not a cron expression; expected minute, hour, day, month and weekday, such as "
                    f"'0 1 * * *' for each day at 1:00"
                ) from error


@dataclass(frozen=True)
class Folder:
    """A folder of manifests, whose stages run on a schedule.

    Args:
        name: stands in the names of its deployments.
        path: the folder, absolute; a text, since a prefect.yaml may have a variable there.
        run_dir: the folder of its runs, absolute.
        stages: those that it has a manifest of.
    """

    name: str
    path: str
    run_dir: str
    stages: Collection[str] = STAGES


# What the committed prefect.yaml has in place of a folder: its readers set the variables.
TEMPLATE = Folder("studio", "{{ $PUSA_MANIFESTS }}", "{{ $PUSA_RUN_DIR }}")


def on_demand() -> list[Deployment]:
    """Return the deployments that run the manifests that are submitted.

    They have no limit: 50 manifests use all workers, each worker runs as many at once as its --limit says, the GPUs
    have locks, and two runs on one folder share its jobs.
    """
    return [_deployment(flow, ON_DEMAND, f"Run {manifests}.") for flow, manifests in FLOWS.items()]


def scheduled(folder: Folder, times: Times) -> list[Deployment]:
    """Return the deployments that run a folder's manifests by themselves, those of the stages that it has.

    Of each one run works at a time and the next waits. It is never cancelled instead: a run that died unseen would
    cancel every later one.
    """
    return [
        _deployment(
            stage,
            f"{folder.name}-{suffix}",
            description,
            parameters={
                "manifest": {"path": f"{folder.path}/{stage}.yaml", "sha256": None},
                "run_dir": folder.run_dir,
                **({"with_new_clips": True} if stage == "finetune" else {}),
            },
            concurrency_limit={"limit": 1, "collision_strategy": "ENQUEUE"},
            **start,
        )
        for stage, suffix, description, start in _starts(folder, times)
        if stage in folder.stages
    ]


def _starts(folder: Folder, times: Times) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Yield the stage, the name's end, the description and the start of each scheduled deployment."""

    def at(cron: str, slug: str) -> dict[str, Any]:
        return {"schedules": [{"cron": cron, "timezone": times.timezone, "slug": slug, "active": times.active}]}

    def after(words: str, event: str) -> dict[str, Any]:
        trigger = {"type": "event", "name": f"{folder.name}: {words}", "enabled": times.active, "expect": [event]}
        return {"triggers": [{**trigger, "match": {"prefect.resource.id": f"{RUN}{folder.run_dir}"}}]}

    yield "ingest", NIGHTLY, "Cut the new videos.", at(times.ingest, NIGHTLY)
    if "ingest" in folder.stages:
        # Not Prefect's own event of a completed run: it may come a quarter of an hour late.
        yield (
            "precompute",
            "new-clips",
            "Encode the new clips.",
            after("after each ingest", STAGE_ENDED.format("ingest")),
        )
    yield "finetune", WEEKLY, "Train on with the new clips, from the last checkpoint.", at(times.finetune, WEEKLY)
    yield "generate", NIGHTLY, "Make the new videos.", at(times.generate, NIGHTLY)
    checkpoint = after("with each new best checkpoint", CHECKPOINT_BEST)
    yield "generate", "new-checkpoint", "Make the videos with the new checkpoint.", checkpoint


def _deployment(flow: str, name: str, description: str, **more: Any) -> Deployment:
    return {
        "name": name,
        "description": description,
        "entrypoint": f"flows.{flow}.{flow}",
        "pull": [],  # the workers have the package
        "work_pool": {"name": POOL},
        **more,
    }


def full_name(deployment: Deployment) -> str:
    """Return FLOW/NAME."""
    return f"{deployment['entrypoint'].rpartition('.')[2]}/{deployment['name']}"


def describe_start(deployment: Deployment) -> str:
    """Say when a deployment runs."""
    for schedule in deployment.get("schedules", ()):
        paused = "" if schedule["active"] else ", paused"
        return f"{_describe_cron(schedule['cron'])}, {schedule['timezone']}{paused}"
    for trigger in deployment.get("triggers", ()):
        return trigger["name"].partition(": ")[2] + ("" if trigger["enabled"] else ", paused")
    return "on demand"


def _describe_cron(cron: str) -> str:
    """Say a time of each day or of a day of the week in words, and leave any other cron expression as it is."""
    minute, hour, *days, weekday = cron.split()
    if not (minute.isdecimal() and hour.isdecimal() and days == ["*", "*"] and weekday in ("*", *"01234567")):
        return f"cron {cron}"
    day = "day" if weekday == "*" else WEEKDAYS[int(weekday) % 7]
    return f"each {day} at {int(hour):02}:{int(minute):02}"


def local_timezone(environment: Mapping[str, str] = os.environ, link: Path = Path("/etc/localtime")) -> str | None:
    """Return the name of this machine's time zone, such as "Europe/Berlin"; None if it cannot be found."""
    named = environment.get("TZ", "").removeprefix(":")
    linked = os.path.realpath(link).partition("zoneinfo/")[2]
    return next((name for name in (named, linked) if name in available_timezones()), None)


def to_yaml(made: Collection[Deployment]) -> str:
    """Return the text of a prefect.yaml with these deployments."""
    return HEADING + yaml.safe_dump({"name": POOL, "deployments": [*made]}, sort_keys=False, width=118)


# On a server.


def to_prefect(deployment: Deployment) -> RunnerDeployment:
    """Return Prefect's object for a deployment."""
    module, _, name = deployment["entrypoint"].rpartition(".")
    limit = deployment.get("concurrency_limit")
    made: RunnerDeployment = getattr(importlib.import_module(module), name).to_deployment(
        name=deployment["name"],
        description=deployment["description"],
        schedules=[Schedule(**schedule) for schedule in deployment.get("schedules", ())] or None,
        concurrency_limit=ConcurrencyLimitConfig(**limit) if limit else None,
        parameters=deployment.get("parameters", {}),
        triggers=[DeploymentEventTrigger(**trigger) for trigger in deployment.get("triggers", ())],
        work_pool_name=deployment["work_pool"]["name"],
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    return made


def register(deployment: Deployment) -> UUID:
    """Make or update a deployment on the server, and return its id.

    Raises:
        PusaError: the server refuses it, or does not answer.
    """
    prepared = to_prefect(deployment)
    try:
        id: Any = prepared.apply()
    except (DeploymentApplyError, httpx.HTTPError) as error:
        raise PusaError(f"the server did not take the deployment {prepared.full_name}: {error}") from error
    return UUID(str(id))


def require_same_manifest(client: SyncPrefectClient, deployment: Deployment) -> None:
    """Raise PusaError if the server has a deployment of this name for another manifest, which it would replace."""
    try:
        present = client.read_deployment_by_name(full_name(deployment))
    except ObjectNotFound:
        return
    there, wanted = ((found or {}).get("manifest") for found in (present.parameters, deployment.get("parameters")))
    if wanted and there and there.get("path") != wanted["path"]:
        raise PusaError(
            f"the server's deployment {full_name(deployment)} runs {preview(there.get('path'))}, and not "
            f"{wanted['path']}; choose another name with --name, or delete that one"
        )


def make_pool(client: SyncPrefectClient) -> None:
    """Make the work pool of Pusa's workers if it is missing.

    Raises:
        PusaError: a pool of another type has its name.
    """
    try:
        pool = client.read_work_pool(POOL)
    except ObjectNotFound:
        pool = client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
    if pool.type not in ("process", "kubernetes"):  # the second as infra/k8s/work-pool.json sets it up
        raise PusaError(
            f"the server's work pool {POOL!r} has the type {pool.type!r}; expected process or kubernetes: delete "
            "it first"
        )


def watch_heartbeats(client: SyncPrefectClient) -> None:
    """Make or update the automation of heartbeats."""
    automation = heartbeat_automation()
    if present := client.read_automations_by_name(HEARTBEAT):
        client.update_automation(present[0].id, automation)
    else:
        client.create_automation(automation)


def heartbeat_automation() -> AutomationCore:
    """Return the automation that marks a run as crashed when its heartbeats cease.

    Otherwise a run whose machine died counts as running for ever, and the next run of its deployment waits for it.
    Flows with other names than Pusa's are left alone: theirs may come at longer intervals.
    """
    beat = "prefect.flow-run.heartbeat"
    return AutomationCore(
        name=HEARTBEAT,
        description=f"Pusa's runs send a heartbeat every {HEARTBEAT_SECONDS} s. Made by `pusa deploy`.",
        trigger=EventTrigger(
            after={beat},
            expect={beat, *(f"prefect.flow-run.{state}" for state in AT_REST)},
            match_related={"prefect.resource.role": "flow", "prefect.resource.name": [*FLOWS]},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=SILENT_SECONDS),
        ),
        actions=[
            ChangeFlowRunState(state=StateType.CRASHED, name="Crashed", message=f"{NO_HEARTBEAT}{SILENT_SECONDS} s")
        ],
    )
