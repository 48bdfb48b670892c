"""The `pusa` command. Nothing heavy is imported before it is needed, so that --help answers at once."""

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flows import plans, published, tables, training, weights
from flows.options import add_command, log_to_console, show
from pusa.errors import ManifestError, PusaError
from pusa.registry import find
from pusa.system.text import printable

STAGES = {
    "ingest": "videos + captions -> verified clips",
    "precompute": "clips -> latents and text features",
    "finetune": "latents -> a transformer with one noise level per latent frame",
    "generate": "jobs -> videos",
}
LONGEST_LINE = 4000  # characters of an error: file names and manifests are strangers' words
MAX_PARAMETER_BYTES = 500_000  # Prefect refuses more than 512 KiB
LISTS = {
    "tasks": "pusa.tasks:TASKS",
    "backbones": "pusa.backbones:BACKBONES",
    "noise-schedules": "pusa.diffusion.noise_schedules:NOISE_SCHEDULES",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 if all of it succeeded, 1 on an error that is told in a sentence."""
    options = build_parser().parse_args(arguments)
    try:
        return options.run(options)
    except (PusaError, OSError) as error:
        print("\n".join(printable(line, LONGEST_LINE) for line in f"pusa: {error}".splitlines()), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("pusa: interrupted; the same command goes on from what was finished", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(prog="pusa", description="Vectorized-timestep video diffusion, run as a pipeline.")
    parser.add_argument("-V", "--version", action="version", version=f"pusa {version('pusa')}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    pipeline = add_command(commands, "pipeline", "run the four stages of a folder of manifests", run_pipeline)
    pipeline.add_argument("folder", type=Path, help="holds ingest.yaml, precompute.yaml, finetune.yaml, generate.yaml")
    _run_options(pipeline)
    for stage, what in STAGES.items():
        command = add_command(commands, stage, what, run_stage)
        command.add_argument("manifest", type=Path, help=f"a YAML file of kind {stage}")
        command.set_defaults(stage=stage)
        _run_options(command)
        if stage == "finetune":
            training.add_options(command)

    check = add_command(commands, "check", "say what is wrong with a manifest, before anything starts", run_check)
    check.add_argument("manifest", type=Path)
    check.add_argument("--run-dir", type=Path)
    plans.add_options(add_command(commands, "plan", plans.HELP, run_plan))
    weights.add_commands(commands.add_parser("weights", help="inspect, convert and download weights"))
    tables.add_commands(commands)
    published.add_commands(commands)
    listing = add_command(commands, "list", "name what can be chosen", run_list)
    listing.add_argument("what", choices=LISTS)
    describing = add_command(commands, "describe", "say what a manifest, or a job of a task, may set", run_describe)
    describing.add_argument("name", help="ingest, precompute, finetune, generate, or a name of `pusa list tasks`")
    demo = add_command(commands, "demo", "the whole chain on the built-in tiny model, on drawn clips", run_demo)
    _run_options(demo)
    dashboard = add_command(commands, "dashboard", "show past and present runs in a browser", run_dashboard)
    dashboard.add_argument("--port", type=int, default=4200)
    tiny = add_command(commands, "make-tiny", "remake the built-in tiny family from nothing (hours)", run_make_tiny)
    tiny.add_argument("folder", type=Path, help="where to; pusa/builtin ships the result")
    quality = add_command(commands, "quality", "measure what the fine-tune adds to each task", run_quality)
    quality.add_argument("--base", default="builtin:tiny", help="weights; default builtin:tiny")
    quality.add_argument("--pusa", default="builtin:tiny-pusa", help="fine-tuned weights; default builtin:tiny-pusa")
    quality.add_argument("--clips", type=int, default=24, help="how many; default 24")
    quality.add_argument("--folder", type=Path, default=Path("runs/quality"), help="where to; default runs/quality")
    return parser


def run_stage(options: argparse.Namespace) -> int:
    """`pusa ingest|precompute|finetune|generate MANIFEST`."""
    from pusa.manifest.loading import default_run_dir, load_manifest

    if training.is_trainer(options):
        return training.run_trainer(options)
    run_dir = (options.run_dir or default_run_dir(options.manifest)).absolute()
    manifest = load_manifest(options.manifest, run_dir, options.stage)
    more = {"overrides": dict(options.override)} if options.stage == "finetune" else {}
    show(_runner(options.stage, options.prefect, manifest)(manifest, run_dir, **more))
    return 0


def run_pipeline(options: argparse.Namespace) -> int:
    """`pusa pipeline FOLDER`: all four manifests are checked before the first stage starts."""
    from pusa.manifest.loading import default_run_dir, load_manifest

    if not options.folder.is_dir():
        raise ManifestError(
            f"{options.folder} is not a folder; it should hold {', '.join(f'{s}.yaml' for s in STAGES)}"
        )
    run_dir = (options.run_dir or default_run_dir(options.folder)).absolute()
    manifests = {stage: load_manifest(options.folder / f"{stage}.yaml", run_dir, stage) for stage in STAGES}
    _refuse_impossible(manifests["generate"], options.folder / "generate.yaml")
    if options.prefect:
        show(_flow("pipeline", *manifests.values())(**manifests, run_dir=run_dir))
    else:
        for stage, manifest in manifests.items():
            show(_runner(stage, False, manifest)(manifest, run_dir))
    return 0


def run_check(options: argparse.Namespace) -> int:
    """`pusa check MANIFEST`: all that is wrong, whatever is wrong with the rest."""
    from pusa.manifest.loading import default_run_dir, read_manifest
    from pusa.manifest.models import FinetuneManifest, GenerateManifest, IngestManifest
    from pusa.weights.resolve import require

    run_dir = (options.run_dir or default_run_dir(options.manifest)).absolute()
    found = read_manifest(options.manifest, run_dir)
    wrong = list(found.problems)
    if isinstance(found.manifest, GenerateManifest):
        wrong += _check_jobs(found.manifest)
    if isinstance(found.manifest, IngestManifest) and not _is_there(found.manifest.source):
        print(f"source {found.manifest.source} is not there yet")
    if isinstance(found.manifest, FinetuneManifest):
        from pusa.finetune.check import check_finetune

        wrong += check_finetune(found.manifest, run_dir, print)
    if (spec := getattr(found.manifest, "model", None)) is not None:
        try:
            require(spec)
        except PusaError as error:
            wrong.append(str(error))
    if wrong:
        raise ManifestError("\n  ".join([f"{options.manifest}:", *wrong]))
    assert found.manifest is not None
    print(f"{options.manifest}: a valid {found.manifest.kind} manifest")
    return 0


def _is_there(source: str) -> bool:
    return source.startswith("hf:") or Path(source).exists()


def _check_jobs(manifest: Any) -> list[str]:
    """Print every job and what it is given; a line for those that cannot be made."""
    from pusa.generate.check import check_jobs, geometry_of, is_pinned, told

    wrong = check_jobs(manifest)
    for job in manifest.jobs:
        print(f"{job.id}: {job.task}, {wrong.get(job.id, 'ok')}")
        for line in told(job, geometry_of(manifest)) if job.id not in wrong else ():
            print(f"  given {line}")
        if job.exact and job.id not in wrong and not is_pinned(job, geometry_of(manifest)):
            print("  exact: no frame has multiplier 0, so there is nothing to put back")
    return [f"{len(wrong)} of {len(manifest.jobs)} jobs cannot be made: {', '.join(wrong)}"] if wrong else []


def run_plan(options: argparse.Namespace) -> int:
    """`pusa plan MANIFEST`."""
    from pusa.manifest.loading import default_run_dir, load_manifest
    from pusa.manifest.models import GenerateManifest

    run_dir = (options.run_dir or default_run_dir(options.manifest)).absolute()
    manifest = load_manifest(options.manifest, run_dir)
    if isinstance(manifest, GenerateManifest):
        _refuse_impossible(manifest, options.manifest)
    for line in plans.lines(manifest, run_dir, options):
        print(line, flush=True)
    return 0


def run_list(options: argparse.Namespace) -> int:
    """`pusa list tasks|backbones|noise-schedules`."""
    print("\n".join(find(LISTS, options.what, "list")))
    return 0


def run_describe(options: argparse.Namespace) -> int:
    """`pusa describe NAME`."""
    from flows.describe import describe

    print(describe(options.name))
    return 0


def run_demo(options: argparse.Namespace) -> int:
    """`pusa demo`: draw the data, run the pipeline of manifests/tiny, say where everything is."""
    from flows.demo import MANIFESTS, farewell
    from pusa.tiny.dataset import draw_dataset

    options.folder = MANIFESTS
    options.run_dir = (options.run_dir or Path("runs/tiny")).absolute()
    print("Drawing the data set ...", file=sys.stderr)
    draw_dataset(options.run_dir / "drawn")
    run_pipeline(options)
    print(farewell(options.run_dir))
    return 0


def run_dashboard(options: argparse.Namespace) -> int:
    """`pusa dashboard`: Prefect's server on the loopback address, with the settings that runs have too."""
    from flows.settings import set_defaults

    set_defaults()
    server = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(options.port)]
    os.execv(sys.executable, server)  # noqa: S606


def run_quality(options: argparse.Namespace) -> int:
    """`pusa quality`: the numbers, and where the page and the contact sheets are."""
    from pusa.evaluate.measure import measure
    from pusa.manifest.models import ModelSpec
    from pusa.weights.resolve import require

    if options.clips < 1:
        raise ManifestError(f"--clips {options.clips}: allowed are 1 and more")
    log_to_console()
    base, pusa = ModelSpec(weights=options.base), ModelSpec(weights=options.pusa)
    for spec in (base, pusa):
        require(spec)
    report = measure(base, pusa, options.clips)
    print(report.text())
    print("\n".join(map(str, report.write(options.folder))))
    return 0


def run_make_tiny(options: argparse.Namespace) -> int:
    """`pusa make-tiny FOLDER`."""
    from pusa.tiny.make import make

    log_to_console()
    make(options.folder)
    print(f"how good they are: pusa quality --base {options.folder}/tiny --pusa {options.folder}/tiny-pusa")
    return 0


def _run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run-dir", type=Path, help="where everything goes; default runs/<name of the manifest's folder>"
    )
    parser.add_argument(
        "--no-prefect",
        dest="prefect",
        action="store_false",
        help="call the stage directly: no server, starts in seconds",
    )


def _refuse_impossible(manifest: Any, path: Path) -> None:
    """Sizes, lengths and positions that no later stage can mend; input files may yet be written by an earlier one."""
    from pusa.generate.check import check_jobs

    if wrong := check_jobs(manifest, with_inputs=False):
        raise ManifestError(f"{path}:\n  " + "\n  ".join(f"{id}: {reason}" for id, reason in wrong.items()))


def _runner(stage: str, prefect: bool, manifest: Any) -> Callable[..., Any]:
    """The stage's flow, or the stage itself."""
    if prefect:
        return _flow(stage, manifest)
    log_to_console()
    if stage == "finetune":
        return training.train
    run = getattr(importlib.import_module(f"pusa.{stage}.stage"), stage)

    def directly(manifest: Any, run_dir: Path) -> Any:
        result = run(manifest, run_dir)
        if stage == "generate":
            result.require_all()
        return result

    return directly


def _flow(name: str, *manifests: Any) -> Callable[..., Any]:
    from flows.settings import set_defaults

    size = sum(len(manifest.model_dump_json()) for manifest in manifests)
    if size > MAX_PARAMETER_BYTES:
        limit = f"a flow run's parameters may have {MAX_PARAMETER_BYTES}"
        raise ManifestError(f"the manifests come to {size} bytes; {limit}: split the jobs, or use --no-prefect")
    set_defaults()
    flow = getattr(importlib.import_module(f"flows.{name}"), name)
    logging.getLogger("pusa").setLevel(logging.INFO)  # Prefect's own console shows it

    from flows.server import start_temporary_server

    start_temporary_server()
    return flow
