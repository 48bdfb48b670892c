"""Run the stages, one by one or as a pipeline, with Prefect or without it.

`pusa STAGE MANIFEST` loads the manifest once and hands it to the stage's flow in flows/STAGE.py, or with --no-prefect
to the stage itself in pusa/STAGE/stage.py.
"""

import importlib
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from flows.commands.manifests import require_possible_jobs
from flows.commands.options import File, NoPrefect, Overrides, Place, RunDir, Text, Until, as_written
from flows.console import log_to_console, print_result
from pusa.errors import ManifestError

STAGES = ("ingest", "precompute", "finetune", "generate")


def ingest(manifest: File, /, *, run_dir: RunDir = None, no_prefect: NoPrefect = False) -> int:
    """Turn videos and captions into verified clips.

    Args:
        manifest: A YAML file of kind ingest.
    """
    return _run_stage("ingest", manifest, run_dir, no_prefect)


def precompute(manifest: File, /, *, run_dir: RunDir = None, no_prefect: NoPrefect = False, place: Place = None) -> int:
    """Encode clips as latents and captions as text features.

    Args:
        manifest: A YAML file of kind precompute.
    """
    return _run_stage("precompute", manifest, run_dir, no_prefect, place)


def finetune(
    manifest: File,
    /,
    *,
    run_dir: RunDir = None,
    no_prefect: NoPrefect = False,
    override: Overrides = None,
    with_new_clips: bool = False,
    result: Annotated[Path | None, Parameter(converter=as_written, show=False)] = None,
) -> int:
    """Train a transformer on latents, with one noise level per latent frame.

    Args:
        manifest: A YAML file of kind finetune.
        override: Resume from the last checkpoint with another value of its recipe; repeat the option for each key.
        with_new_clips: Train on with a latents table that has changed, for as many steps again as the manifest says.
        result: The file in which a child of flows/launch.py reports how it ended.
    """
    from flows.launch import is_trainer, run_trainer
    from pusa.manifest.loading import default_run_dir

    if is_trainer(result):
        return run_trainer(manifest, run_dir or default_run_dir(manifest), override or {}, result)
    more = {"overrides": dict(override or {}), "with_new_clips": with_new_clips}
    return _run_stage("finetune", manifest, run_dir, no_prefect, arguments=more)


def generate(
    manifest: File,
    /,
    *,
    run_dir: RunDir = None,
    no_prefect: NoPrefect = False,
    place: Place = None,
    until: Until = None,
    retry_failed: bool = False,
) -> int:
    """Render jobs as videos, or as drafts if the manifest says so.

    Args:
        manifest: A YAML file of kind generate.
        retry_failed: Only try the jobs again that have failed.
    """
    more = {"retry_failed": retry_failed, **(_stop_at(until) if no_prefect else {"until": until} if until else {})}
    return _run_stage("generate", manifest, run_dir, no_prefect, place, more)


def finish(
    run: File,
    /,
    *ids: Text,
    every: Annotated[bool, Parameter(name="--all", help="All jobs of the run.")] = False,
    listed: Annotated[File | None, Parameter(name="--list", metavar="FILE")] = None,
    no_prefect: NoPrefect = False,
    place: Place = None,
    until: Until = None,
    submit: bool = False,
) -> int:
    """Make chosen drafts of a run to the end, and what they read. The others stay drafts.

    Args:
        run: The folder of the run, for example runs/tiny. No manifest is needed: the run keeps its own.
        ids: The ids of the jobs.
        listed: A file with their ids, one a line, as the gallery saves it; # begins a comment.
        submit: Have a worker of the server do it, as `pusa submit` does, which finds the run by the same path.
    """
    from flows.commands.submit import send
    from flows.handover import ManifestFile, changed
    from flows.settings import load_prefect
    from pusa.generate.finish import Chosen
    from pusa.generate.ledger import WORK
    from pusa.generate.listed import JOBS, manifest_of_run

    run = run.absolute()
    chosen = Chosen(ids=ids, file=listed and listed.absolute(), all=every)
    manifest = manifest_of_run(run)
    chosen_ids = chosen.ids_in(manifest)
    if submit and no_prefect:
        raise ManifestError("--submit needs Prefect, and --no-prefect is without it; name one of them")
    if no_prefect:
        stop = {"chosen": chosen_ids, **_stop_at(until)}
        _direct_call("generate", run / "videos")(changed(manifest, {"place": place}), run, **stop)
    else:
        options = {name: value for name, value in (("place", place), ("until", until)) if value is not None}
        file, paths = ManifestFile(path=run / "videos" / WORK / JOBS), [run, *([chosen.file] if chosen.file else [])]
        if submit:
            require_utf8(*paths)
            load_prefect()
            send("generate", f"finish {run.name}", {"manifest": file, "run_dir": run, "finish": chosen, **options})
        else:
            _flow("generate", *paths)(file, run, finish=chosen, **options)
    return 0


def pipeline(folder: File, /, *, run_dir: RunDir = None, no_prefect: NoPrefect = False) -> int:
    """Run the four stages of a folder of manifests.

    All four manifests are checked before the first stage starts.

    Args:
        folder: A folder with ingest.yaml, precompute.yaml, finetune.yaml and generate.yaml.
    """
    from flows.handover import ManifestFile, read
    from pusa.manifest.loading import default_run_dir
    from pusa.manifest.models import KINDS
    from pusa.system.failures import PartialFailures

    if not folder.is_dir():
        names = ", ".join(f"{stage}.yaml" for stage in STAGES)
        raise ManifestError(f"{folder} is not a folder; expected a folder with {names}")
    run_dir = (run_dir or default_run_dir(folder)).absolute()
    paths = {stage: folder / f"{stage}.yaml" for stage in STAGES}
    files = {stage: ManifestFile(path=path) if no_prefect else ManifestFile.of(path) for stage, path in paths.items()}
    manifests = {stage: read(file, run_dir, KINDS[stage]) for stage, file in files.items()}
    require_possible_jobs(manifests["generate"], folder / "generate.yaml", run_dir / "videos")
    if no_prefect:
        failures = PartialFailures()
        for stage, manifest in manifests.items():
            with failures.collected():
                _direct_call(stage, paths[stage])(manifest, run_dir)
        failures.require_none()
    else:
        _flow("pipeline", run_dir, folder)(**files, run_dir=run_dir)
    return 0


def _run_stage(
    stage: str,
    path: Path,
    run_dir: Path | None,
    no_prefect: bool,
    place: object = None,
    arguments: Mapping[str, Any] = {},
) -> int:
    """Load the manifest, run its stage at `place`, or where the manifest says, and print the result."""
    from flows.handover import ManifestFile, read
    from pusa.manifest.loading import default_run_dir
    from pusa.manifest.models import KINDS

    run_dir = (run_dir or default_run_dir(path)).absolute()
    file = ManifestFile(path=path) if no_prefect else ManifestFile.of(path)
    changes = {} if place is None else {"place": place}
    manifest = read(file, run_dir, KINDS[stage], **changes)
    if no_prefect:
        _direct_call(stage, path)(manifest, run_dir, **arguments)
    else:
        _flow(stage, run_dir, path)(file, run_dir, **changes, **arguments)
    return 0


def _stop_at(until: str | None) -> dict[str, float]:
    """Return the argument of a stage that starts no work after this time of day; none without a time."""
    from pusa.generate.chunks import next_time

    return {} if until is None else {"stop_at": next_time(until, time.time())}


def _direct_call(stage: str, path: Path) -> Callable[..., None]:
    """Return a function that runs a stage without Prefect, prints its result, and then raises PartlyFailed if it is."""
    from flows.notices import noticed

    log_to_console()

    def run(manifest: Any, run_dir: Path, **arguments: Any) -> None:
        with noticed(stage, manifest, path, run_dir) as outcome:
            if stage == "finetune":
                from flows.launch import train as call
            else:
                call = getattr(importlib.import_module(f"pusa.{stage}.stage"), stage)
            outcome.result = call(manifest, run_dir, **arguments)
        print_result(outcome.result)
        if stage != "finetune":
            outcome.result.require_all()

    return run


def _flow(name: str, *paths: Path) -> Callable[..., None]:
    """Return a function that does the same with the Prefect flow of a name; the server that it reports to is running.

    Raises:
        ManifestError: a path is not UTF-8.
        PusaError: the server cannot be reached or started.
    """
    from flows.settings import WITHOUT, load_prefect

    require_utf8(*paths, without=f", {WITHOUT}")

    load_prefect()
    logging.getLogger("pusa").setLevel(logging.INFO)  # Prefect's own console shows it
    from flows.server import require_server
    from flows.watch import watched

    server = require_server()

    def run(*arguments: Any, **named: Any) -> None:
        from flows.states import whole

        with watched(server):
            flow = getattr(importlib.import_module(f"flows.{name}"), name)
            state = flow(*arguments, **named, return_state=True)
        print_result(state.result())
        whole(state)

    return run


def require_utf8(*paths: Path, without: str = "") -> None:
    """Raise ManifestError if Prefect cannot record a path, since its name is not UTF-8; `without` ends the message."""
    for path in paths:
        try:
            str(path.absolute()).encode()
        except UnicodeEncodeError as error:
            raise ManifestError(f"Prefect cannot record {path}, since it is not UTF-8: rename it{without}") from error
