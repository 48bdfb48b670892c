"""Send a manifest to the server, where a worker runs it."""

import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter, Token

from flows.commands.manifests import require_possible_jobs
from flows.commands.options import File, Place, RunDir, Until
from flows.commands.stages import STAGES, Overrides, require_utf8
from flows.console import show
from pusa.errors import ManifestError, PusaError

if TYPE_CHECKING:
    from flows.handover import ManifestFile

CLOCK = re.compile(r"(\d{1,2}):(\d{2})")
OPTIONS = {
    "place": ("precompute", "generate"),
    "until": ("generate",),
    "retry_failed": ("generate",),
    "overrides": ("finetune",),
    "with_new_clips": ("finetune",),
}


def to_time(kind: type, tokens: Sequence[Token], now: datetime | None = None) -> datetime:
    """Return the next 22:30, or the time of a date and a time, in this machine's time zone unless it names one."""
    text = tokens[0].value
    now = now or datetime.now().astimezone()
    try:
        if clock := CLOCK.fullmatch(text):
            today = datetime(now.year, now.month, now.day, int(clock[1]), int(clock[2]))
            # Each in the offset of its own day: it may change in between.
            return next(time for days in (0, 1) if (time := (today + timedelta(days=days)).astimezone()) > now)
        time = datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError):  # OverflowError: the year 1 or 9999 in another time zone
        raise ValueError(f"{text:.80} is not a time; expected 22:30, or such as 2026-12-01T22:30") from None
    if time <= now:
        raise ValueError(f"{text:.80} is over: it is {now:%Y-%m-%dT%H:%M:%S%z} now")
    return time


def submit(
    manifest: File,
    /,
    *,
    run_dir: RunDir = None,
    at: Annotated[datetime | None, Parameter(converter=to_time, metavar="TIME")] = None,
    place: Place = None,
    until: Until = None,
    retry_failed: bool = False,
    override: Overrides = None,
    with_new_clips: bool = False,
) -> int:
    """Send a manifest to the server of PREFECT_API_URL: a worker runs it, now or at a time.

    It is checked here, and again by the worker, which must find the file, and all that it names, by the same paths. A
    file that is changed after it was submitted is refused.

    Args:
        manifest: A manifest of any kind; or, for the pipeline, a folder with those of all four stages.
        at: When the run starts, at the earliest: 22:30, or a date and a time as 2026-12-01T22:30; default now.
        retry_failed: Only try the jobs again that have failed.
        override: Resume a training with another value of its recipe; repeat the option for each key.
        with_new_clips: Train on with a latents table that has changed, for as many steps again as the manifest says.
    """
    from pusa.manifest.loading import default_run_dir

    run_dir = (run_dir or default_run_dir(manifest)).absolute()
    flow, files = _read(manifest, run_dir)
    options = {
        "place": place,
        "until": until,
        "retry_failed": retry_failed or None,
        "overrides": dict(override or {}) or None,
        "with_new_clips": with_new_clips or None,
    }
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if flow not in OPTIONS[name]:
            option = "--override" if name == "overrides" else "--" + name.replace("_", "-")
            raise ManifestError(f"{option} is for {' and '.join(OPTIONS[name])}; {manifest} is for {flow}")
    require_utf8(run_dir, manifest)

    from flows.settings import load_prefect

    load_prefect()
    from flows.handover import describe_run

    name = f"pipeline {run_dir.name}" if flow == "pipeline" else describe_run(flow, files["manifest"], run_dir)
    send(flow, name, {**files, "run_dir": run_dir, **given}, at)
    return 0


def send(flow: str, name: str, parameters: "dict[str, Any]", at: datetime | None = None) -> None:
    """Have the server run a flow at a time, or now, and print where to see it.

    Raises:
        PusaError: the server does not answer, or was not set up.
    """
    from prefect.client.schemas.objects import WorkerStatus
    from prefect.exceptions import ObjectNotFound
    from prefect.settings import PREFECT_UI_URL
    from prefect.states import Scheduled
    from pydantic_core import to_jsonable_python

    from flows.runs import connected

    with connected() as client:
        try:
            deployment = client.read_deployment_by_name(f"{flow}/on-demand")
        except ObjectNotFound as error:
            raise PusaError(f"the server has no deployment {flow}/on-demand; make it with `pusa deploy`") from error
        run = client.create_flow_run_from_deployment(
            deployment.id, parameters=to_jsonable_python(parameters), state=Scheduled(scheduled_time=at), name=name
        )
        pool = deployment.work_pool_name or ""
        online = [worker for worker in client.read_workers_for_work_pool(pool) if worker.status == WorkerStatus.ONLINE]
    show(
        f"submitted {name}, to start {f'at {at:%Y-%m-%d %H:%M:%S %z}' if at else 'now'}",
        f"  {PREFECT_UI_URL.value()}/runs/flow-run/{run.id}",
        f"  follow it with: pusa watch {str(run.id)[:8]}",
    )
    if not online:
        show(f"it waits for a worker, and none serves the pool {pool!r} at the moment: start one with `pusa worker`")


def _read(path: Path, run_dir: Path) -> "tuple[str, dict[str, ManifestFile]]":
    """Check a manifest, or those of a folder; return the name of the flow for it and the flow's parameters for files.

    Raises:
        ManifestError: one cannot be read, or has problems, each on a line.
    """
    from flows.handover import ManifestFile, read
    from pusa.manifest.loading import read_mapping
    from pusa.manifest.models import KINDS

    if path.is_dir():
        files = {stage: ManifestFile.of(path / f"{stage}.yaml") for stage in STAGES}
        flow, kinds = "pipeline", dict(zip(files, STAGES, strict=True))
    else:
        files, flow = {"manifest": ManifestFile.of(path)}, str(read_mapping(path).get("kind"))
        kinds = {"manifest": flow}
    if flow not in (*KINDS, "pipeline"):
        raise ManifestError(f"{path}: kind is {flow!r}; allowed are {', '.join(KINDS)}")
    for key, kind in kinds.items():
        manifest = read(files[key], run_dir, KINDS[kind])
        if kind == "generate":
            require_possible_jobs(manifest, files[key].path, run_dir / "videos")
    return flow, files
