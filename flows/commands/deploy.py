"""Set a Prefect server up for Pusa: `pusa deploy`."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter, Token

from flows.commands.options import Count, File, RunDir, Text
from flows.commands.stages import require_utf8
from flows.console import show
from pusa.errors import ManifestError, PusaError
from pusa.system.text import preview

if TYPE_CHECKING:
    from flows.deployments import Deployment, Folder


def to_timezone(kind: type, tokens: Sequence[Token]) -> str:
    """Return the name of a time zone."""
    from zoneinfo import available_timezones

    name = tokens[0].value
    if name not in available_timezones():
        raise ValueError(f"{name:.80} is not the name of a time zone; expected one such as Europe/Berlin or UTC")
    return name


def deploy(
    folder: File | None = None,
    /,
    *,
    run_dir: RunDir = None,
    timezone: Annotated[str | None, Parameter(converter=to_timezone, metavar="ZONE")] = None,
    ingest_at: Annotated[Text, Parameter(metavar="CRON")] = "0 1 * * *",
    finetune_at: Annotated[Text, Parameter(metavar="CRON")] = "0 3 * * 6",
    generate_at: Annotated[Text, Parameter(metavar="CRON")] = "0 20 * * *",
    paused: bool = False,
    gpu_steps: Count | None = None,
    name: Text | None = None,
    print_: Annotated[bool, Parameter(name="--print")] = False,
) -> int:
    """Set the server up: the work pool, the deployments, and what marks dead runs as crashed.

    Without a folder these are the deployments that `pusa submit` uses. With a folder of manifests its stages also run
    by themselves: ingest each night and precompute after it, finetune each week, generate each night and with each new
    best checkpoint. Repeat the command after an upgrade or with other options; the last one counts.

    Args:
        folder: A folder with some of ingest.yaml, precompute.yaml, finetune.yaml and generate.yaml.
        timezone: The time zone of the schedules; default that of this machine.
        ingest_at: When ingest runs: minute, hour, day, month, weekday.
        finetune_at: When finetune runs.
        generate_at: When generate runs.
        paused: Start nothing by itself until it is resumed, on the dashboard or without this option.
        gpu_steps: How many steps with the tag gpu may run at once on all machines together; a training needs 2.
        name: What the names of the folder's deployments begin with; default the folder's name.
        print_: Only print the deployments, as a prefect.yaml for `prefect deploy`.
    """
    from flows.settings import load_prefect

    load_prefect()
    from flows.deployments import TEMPLATE, Times, local_timezone, on_demand, scheduled, to_yaml

    zone = timezone or ("UTC" if folder is None else local_timezone())
    times = Times(zone or "UTC", ingest_at, finetune_at, generate_at, active=not paused)
    planned = _read_folder(folder, run_dir, name) if folder else TEMPLATE if print_ else None
    made = [*on_demand(), *(scheduled(planned, times) if planned else ())]
    if print_:
        show(to_yaml(made).rstrip("\n"))
        return 0
    _set_up(made, gpu_steps)
    if planned:
        _show_missing(planned.stages)
    if not zone:
        show("the time zone of this machine cannot be found: it is UTC; choose another with --timezone")
    return 0


def _set_up(made: "Sequence[Deployment]", gpu_steps: int | None) -> None:
    """Bring a server to the state that a list of deployments needs, and print it."""
    from prefect.settings import PREFECT_UI_URL

    from flows.deployments import (
        describe_start,
        full_name,
        make_pool,
        register,
        require_same_manifest,
        watch_heartbeats,
    )
    from flows.runs import connected

    with connected() as client:
        for deployment in made:
            require_same_manifest(client, deployment)
        make_pool(client)
        watch_heartbeats(client)
        if gpu_steps:
            client.create_concurrency_limit("gpu", gpu_steps)
            show(f"at most {gpu_steps} steps with the tag gpu run at once")
    width = max(len(full_name(deployment)) for deployment in made)
    for deployment in made:
        link = f"{PREFECT_UI_URL.value()}/deployments/deployment/{register(deployment)}"
        show(f"{full_name(deployment):<{width}}  {describe_start(deployment)}", f"  {link}")
    show("the server has these deployments; `pusa worker` runs them")


def _read_folder(path: Path, run_dir: Path | None, name: str | None) -> "Folder":
    """Check a folder's manifests and return its description.

    Raises:
        ManifestError: it is not a folder, is not UTF-8, has no manifests, or one with a problem.
        PusaError: a deployment cannot have its name.
    """
    from flows.deployments import BANNED, STAGES, Folder
    from flows.handover import ManifestFile, read
    from pusa.manifest.loading import default_run_dir
    from pusa.manifest.models import KINDS

    if not path.is_dir():
        raise ManifestError(f"{path} is not a folder; expected one with manifests")
    run_dir, name = (run_dir or default_run_dir(path)).absolute(), name or path.resolve().name
    require_utf8(path, run_dir)
    if not name or not name.isprintable() or set(name) & set(BANNED):
        raise PusaError(
            f"{preview(name)} cannot begin a deployment's name; expected printable characters without {BANNED}: choose "
            "another with --name"
        )
    stages = [stage for stage in STAGES if (path / f"{stage}.yaml").exists()]
    if not stages:
        names = ", ".join(f"{stage}.yaml" for stage in STAGES)
        raise ManifestError(f"{path} has no manifest; expected some of {names}")
    for stage in stages:
        read(ManifestFile.of(path / f"{stage}.yaml"), run_dir, KINDS[stage])
    return Folder(name, str(path.absolute()), str(run_dir), stages)


def _show_missing(stages: Collection[str]) -> None:
    """Say which stages are not scheduled."""
    from flows.deployments import STAGES

    missing = [f"{stage}.yaml" for stage in STAGES if stage not in stages]
    if missing:
        show(f"not scheduled, since the folder has no {', '.join(missing)}")
    if "precompute" in stages and "ingest" not in stages:
        show("precompute is not scheduled either, since it runs after ingest")
