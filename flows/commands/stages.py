"""Run the stages, one by one or as a pipeline, with Prefect or without it; and show past runs in a browser.

`pusa STAGE MANIFEST` loads the manifest once and hands it to the stage's flow in flows/STAGE.py, or with --no-prefect
to the stage itself in pusa/STAGE/stage.py.
"""

import importlib
import logging
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter, Token
from pydantic_core import PydanticSerializationError, to_json

from flows.commands.manifests import require_possible_jobs
from flows.commands.options import File, NoPrefect, Place, RunDir, as_written
from flows.console import log_to_console, print_result, show
from pusa.errors import ManifestError, PusaError

STAGES = ("ingest", "precompute", "finetune", "generate")
HOST_NAME = re.compile(r"\[[0-9a-f:.]+\]|[a-z0-9._-]+", re.IGNORECASE)
MAX_PARAMETER_BYTES = 500_000  # Prefect refuses more than 512 KiB


def to_overrides(kind: type, tokens: Sequence[Token]) -> dict[str, str]:
    """Return the keys and values of KEY=VALUE texts. A relative path of `latents` becomes absolute."""
    from pusa.system.strict import RUN_PREFIX

    overrides = {}
    for token in tokens:
        key, equals, value = token.value.partition("=")
        if not (key and equals):
            raise ValueError(f"{token.value!r} is not KEY=VALUE")
        if key == "latents" and not value.startswith(f"{RUN_PREFIX}/"):
            value = str(Path(value).absolute())  # the trainer may start in another folder
        overrides[key] = value
    return overrides


def require_host_names(kind: type, names: Sequence[str]) -> None:
    """Raise ValueError if one of these is not what a browser or a proxy calls a host."""
    for name in names:
        if not HOST_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not the name of a host; expected a name without a scheme or port")


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
    override: Annotated[
        Mapping[str, str],
        Parameter(converter=to_overrides, accepts_keys=False, n_tokens=-1, json_dict=False, metavar="KEY=VALUE"),
    ] = {},
    result: Annotated[Path | None, Parameter(converter=as_written, show=False)] = None,
) -> int:
    """Train a transformer on latents, with one noise level per latent frame.

    Args:
        manifest: A YAML file of kind finetune.
        override: Resume from the last checkpoint with another value of its recipe; repeat the option for each key.
        result: The file in which a child of flows/launch.py reports how it ended.
    """
    from flows.launch import is_trainer, run_trainer
    from pusa.manifest.loading import default_run_dir

    if is_trainer(result):
        return run_trainer(manifest, run_dir or default_run_dir(manifest), override, result)
    return _run_stage("finetune", manifest, run_dir, no_prefect, overrides=dict(override))


def generate(
    manifest: File,
    /,
    *,
    run_dir: RunDir = None,
    no_prefect: NoPrefect = False,
    place: Place = None,
    retry_failed: bool = False,
) -> int:
    """Render jobs as videos.

    Args:
        manifest: A YAML file of kind generate.
        retry_failed: Only try the jobs again that have failed.
    """
    return _run_stage("generate", manifest, run_dir, no_prefect, place, retry_failed=retry_failed)


def pipeline(folder: File, /, *, run_dir: RunDir = None, no_prefect: NoPrefect = False) -> int:
    """Run the four stages of a folder of manifests.

    All four manifests are checked before the first stage starts.

    Args:
        folder: A folder with ingest.yaml, precompute.yaml, finetune.yaml and generate.yaml.
    """
    from pusa.manifest.loading import default_run_dir, load_manifest
    from pusa.system.failures import PartialFailures

    if not folder.is_dir():
        names = ", ".join(f"{stage}.yaml" for stage in STAGES)
        raise ManifestError(f"{folder} is not a folder; expected a folder with {names}")
    run_dir = (run_dir or default_run_dir(folder)).absolute()
    manifests = {stage: load_manifest(folder / f"{stage}.yaml", run_dir, stage) for stage in STAGES}
    require_possible_jobs(manifests["generate"], folder / "generate.yaml", run_dir / "videos")
    if no_prefect:
        failures = PartialFailures()
        for stage, manifest in manifests.items():
            with failures.collected():
                _direct_call(stage)(manifest, run_dir)
        failures.require_none()
    else:
        _flow("pipeline", run_dir, *manifests.values())(**manifests, run_dir=run_dir)
    return 0


def dashboard(
    *,
    port: Annotated[int, Parameter(metavar="PORT")] = 4200,
    allow_host: Annotated[tuple[str, ...], Parameter(metavar="NAME", validator=require_host_names)] = (),
) -> int:
    """Show past and present runs in a browser.

    Prefect's server listens on the loopback address, with the settings that the runs have. It answers its own pages and
    programs, and no page of another site.

    Args:
        port: The port on 127.0.0.1.
        allow_host: Another name of this server, behind a proxy that passes it on; repeat the option for each name.
    """
    from flows.settings import load_prefect

    try:
        with socket.create_server(("127.0.0.1", port)) as free:
            port = free.getsockname()[1]  # another one than `port` if that is 0
    except (OSError, OverflowError) as error:
        raise PusaError(f"port {port} of 127.0.0.1 cannot be used: {error}; choose another with --port") from error
    load_prefect()
    logging.getLogger("pusa").setLevel(logging.INFO)
    from flows.own_server import Dashboard

    server = Dashboard(port, allow_host)
    server.start()
    show(f"the dashboard is at {server.address}; to send runs to it, set PREFECT_API_URL={server.api_url}")
    server.wait()
    return 0


def _run_stage(
    stage: str, path: Path, run_dir: Path | None, no_prefect: bool, place: object = None, **arguments: Any
) -> int:
    """Load the manifest, run its stage at `place` or where the manifest says, and print the result."""
    from pusa.manifest.loading import default_run_dir, load_manifest

    run_dir = (run_dir or default_run_dir(path)).absolute()
    manifest = load_manifest(path, run_dir, stage)
    if place is not None:
        manifest = manifest.model_copy(update={"place": place})
    run = _direct_call(stage) if no_prefect else _flow(stage, run_dir, manifest)
    run(manifest, run_dir, **arguments)
    return 0


def _direct_call(stage: str) -> Callable[..., None]:
    """Return a function that runs a stage without Prefect, prints its result, and then raises PartlyFailed if it is."""
    log_to_console()

    def run(manifest: Any, run_dir: Path, **arguments: Any) -> None:
        if stage == "finetune":
            from flows.launch import train

            print_result(train(manifest, run_dir, **arguments))
        else:
            result = getattr(importlib.import_module(f"pusa.{stage}.stage"), stage)(manifest, run_dir, **arguments)
            print_result(result)
            result.require_all()

    return run


def _flow(name: str, run_dir: Path, *manifests: Any) -> Callable[..., None]:
    """Return a function that does the same with the Prefect flow of a name; the server that it reports to is running.

    Raises:
        ManifestError: the manifests are too long to be parameters of a flow run, or a path is not UTF-8.
        PusaError: the server cannot be reached or started.
    """
    try:
        size = sum(len(to_json(value)) for value in (str(run_dir), *manifests))
    except PydanticSerializationError as error:
        raise ManifestError(
            f"Prefect cannot record {run_dir} or a path in the manifest, since it is not UTF-8: rename it, or use "
            "--no-prefect"
        ) from error
    if size > MAX_PARAMETER_BYTES:
        raise ManifestError(
            f"the manifests have {size} bytes as parameters of a flow run; at most {MAX_PARAMETER_BYTES} are allowed: "
            "split the jobs, or use --no-prefect"
        )
    from flows.settings import load_prefect

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
