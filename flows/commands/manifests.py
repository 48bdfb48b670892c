"""Look at manifests before a run: check one, plan its memory, list what can be chosen, describe the keys."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter, Token

from flows.commands.options import File, RunDir, Text, to_count, to_positive
from flows.console import show
from pusa.errors import ManifestError, PusaError, TableError
from pusa.registry import find
from pusa.system.text import join_lines

if TYPE_CHECKING:
    import torch

    from pusa.manifest.models import Bucket, GenerateManifest

FOR_FINETUNE = Group("For a finetune manifest", sort_key=9)
LISTS = {
    "tasks": "pusa.tasks:TASKS",
    "backbones": "pusa.backbones:BACKBONES",
    "noise-schedules": "pusa.diffusion.noise_schedules:NOISE_SCHEDULES",
    "presets": "pusa.tasks.base:PRESETS",
    "courses": "pusa.diffusion.courses:FORMS",
}


def to_size(kind: type, tokens: Sequence[Token]) -> tuple[int, int]:
    """Return the width and the height in pixels of WIDTHxHEIGHT."""
    text = tokens[0].value
    match = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", text)
    if not match:
        raise ValueError(f"{text} is not WIDTHxHEIGHT")
    return int(match[1]), int(match[2])


def list_names(what: Literal["tasks", "backbones", "noise-schedules", "presets", "courses"], /) -> int:
    """List the names that a manifest can choose from.

    Args:
        what: The kind of names.
    """
    show(*find(LISTS, what, "list"))
    return 0


def describe(name: Text, /) -> int:
    """Describe every key of a manifest, or of a job of a task.

    Args:
        name: ingest, precompute, finetune, generate, or a name that `pusa list tasks` prints.
    """
    from flows.commands.describe import describe

    show(describe(name))
    return 0


def check(manifest: File, /, *, run_dir: RunDir = None) -> int:
    """Report every problem of a manifest, before anything starts.

    Args:
        manifest: A YAML file of any kind.
    """
    from pusa.manifest.loading import default_run_dir, read_manifest
    from pusa.manifest.models import FinetuneManifest, GenerateManifest, IngestManifest
    from pusa.weights.model import require_settings
    from pusa.weights.resolve import require_model

    run_dir = (run_dir or default_run_dir(manifest)).absolute()
    read = read_manifest(manifest, run_dir)
    problems = list(read.problems)
    if isinstance(read.manifest, IngestManifest):
        from pusa.ingest.sources import missing_source

        source = read.manifest.source
        if not source.startswith("hf:") and (missing := missing_source(source, Path(source))):
            show(missing)
    if isinstance(read.manifest, GenerateManifest):
        problems += _check_jobs(read.manifest, run_dir)
    if isinstance(read.manifest, FinetuneManifest):
        from pusa.finetune.check import check_finetune

        problems += check_finetune(read.manifest, run_dir, show)
    if (spec := getattr(read.manifest, "model", None)) is not None:
        try:
            require_model(spec)
            require_settings(spec)
        except PusaError as error:
            problems.append(str(error))
    if problems:
        raise ManifestError(join_lines(f"{manifest}:", problems))
    assert read.manifest is not None
    show(f"{manifest}: a valid {read.manifest.kind} manifest")
    return 0


def _check_jobs(manifest: Any, run_dir: Path) -> list[str]:
    """Print every job and its conditions; return lines: how many jobs cannot be made, if there are any, and why."""
    from pusa.diffusion.courses import SCHEDULE, name_levels
    from pusa.generate.check import JobChecks, geometry_of, has_pinned_input, stored_space
    from pusa.generate.sampling import total_steps

    checks = JobChecks(manifest, run_dir / "videos", stored_space(manifest.model))
    problems = {id: failure.message for id, failure in checks.failures().items()}
    for job in manifest.jobs:
        show(f"{job.id}: {job.task}, {problems.get(job.id, 'ok')}")
        if job.id in problems:
            continue
        for line in checks.describe_inputs(job):
            show(f"  given {line}")
        if job.levels != SCHEDULE:
            show(f"  levels {name_levels(job.levels)}: {total_steps(job, geometry_of(manifest))} steps")
        if job.exact and not has_pinned_input(job, geometry_of(manifest)):
            show("  exact: no frame has multiplier 0, so there is nothing to put back")
    if manifest.drafts or manifest.until:
        from pusa.generate.outlook import describe_drafts

        show(*describe_drafts(manifest, geometry_of(manifest), run_dir / "videos", problems))
    if not problems:
        return []
    count = f"{len(problems):,} of {len(manifest.jobs):,} jobs cannot be made:"
    return [count, *(f"{id}: {problem}" for id, problem in problems.items())]


def require_possible_jobs(manifest: Any, path: Path, folder: Path | None = None) -> None:
    """Check the sizes, lengths and positions of the jobs. An earlier stage may still have to write the input files.

    With the folder that the videos will go to, also check that no jobs wait for each other's results.

    Raises:
        ManifestError: a job cannot be made; each one is named, a line each.
    """
    from pusa.generate.check import check_jobs

    if problems := check_jobs(manifest, with_inputs=False, folder=folder):
        raise ManifestError(join_lines(f"{path}:", [f"{id}: {problem}" for id, problem in problems.items()]))


def plan(
    manifest: File,
    /,
    *,
    gpu_memory: Annotated[float | None, Parameter(converter=to_positive, metavar="GIB")] = None,
    gpus: Annotated[int | None, Parameter(converter=to_count, group=FOR_FINETUNE, metavar="N")] = None,
    size: Annotated[
        tuple[int, int] | None, Parameter(converter=to_size, n_tokens=1, group=FOR_FINETUNE, metavar="WxH")
    ] = None,
    frames: Annotated[int | None, Parameter(converter=to_count, group=FOR_FINETUNE, metavar="N")] = None,
    run_dir: Annotated[RunDir, Parameter(help="The folder of the run, which may have latents or videos.")] = None,
) -> int:
    """Print what a generate or finetune manifest needs on each GPU, and whether it fits. Nothing is loaded.

    For jobs, also: how many are made already, the disk space and the time of the others, and the sizes that are legal.

    Args:
        manifest: A YAML file of kind generate or finetune.
        gpu_memory: Plan for a device with this memory, in bf16, in place of this machine's.
        gpus: The number of GPUs, in place of the manifest's parallel.processes.
        size: The size of the clips, where there is no latents table yet.
        frames: The number of frames of the clips, with --size.
    """
    import torch

    from pusa.backbones.dry_run import GIB, memory_of
    from pusa.manifest.loading import default_run_dir, load_manifest
    from pusa.manifest.models import FinetuneManifest, GenerateManifest
    from pusa.weights.model import default_device, default_dtype

    run_dir = (run_dir or default_run_dir(manifest)).absolute()
    loaded = load_manifest(manifest, run_dir)
    device = default_device()
    dtype = torch.bfloat16 if gpu_memory else default_dtype(device)
    memory = int(gpu_memory * GIB) if gpu_memory else memory_of(device)
    if isinstance(loaded, GenerateManifest):
        require_possible_jobs(loaded, manifest)
        for name, value in {"gpus": gpus, "size": size, "frames": frames}.items():
            if value:
                raise ManifestError(f"--{name} is for a finetune manifest; {manifest} is of kind generate")
        _plan_jobs(loaded, run_dir / "videos", dtype, memory)
    elif isinstance(loaded, FinetuneManifest):
        from pusa.finetune.plan import report

        if gpus:
            parallel = loaded.parallel.model_copy(update={"processes": gpus})
            loaded = loaded.model_copy(update={"parallel": parallel})
        if not (gpu_memory or torch.cuda.is_available()):
            memory //= loaded.parallel.processes  # they share one machine's memory
        if loaded.precision:
            dtype = getattr(torch, loaded.precision)
        shapes = _clip_shapes(loaded.latents or run_dir / "latents", size, frames)
        for line in report(loaded, shapes, dtype, memory):
            show(line)
    else:
        raise ManifestError(f"{manifest}: kind is {loaded.kind!r}; allowed are generate and finetune")
    return 0


def _plan_jobs(manifest: "GenerateManifest", folder: Path, dtype: "torch.dtype", memory: int) -> None:
    """Print the memory that the jobs need, then what they will find in the folder of their videos.

    A job that lacks an input is left out, unless all do: an earlier stage may have to write the inputs.
    """
    from pusa.generate.check import check_jobs, geometry_of
    from pusa.generate.outlook import describe_drafts, look_ahead
    from pusa.generate.plan import plan

    show(f"{manifest.model.weights}, {str(dtype).removeprefix('torch.')}, {len(manifest.jobs):,} jobs")
    impossible = check_jobs(manifest, folder=folder)
    if impossible:
        show(f"{len(impossible):,} cannot be made: see `pusa check`")
    possible = [job for job in manifest.jobs if job.id not in impossible]
    if not possible:
        possible, impossible = list(manifest.jobs), {}
    planned = manifest.model_copy(update={"jobs": possible})
    show(plan(planned, dtype).table(memory, manifest.model.offload))
    geometry = geometry_of(manifest)
    show(*look_ahead(possible, geometry, folder, _count_slots(manifest.place)).lines(geometry, folder))
    if lines := describe_drafts(manifest, geometry, folder, impossible):
        show(*lines)


def _count_slots(place: Any) -> int:
    """Return how many jobs are made at a time at a manifest's `place`."""
    import torch

    if place == "local":
        return max(1, torch.cuda.device_count())
    return getattr(place, "processes", 0) or getattr(place, "slots", 0) or len(place.gpus)


def _clip_shapes(table: Path, size: tuple[int, int] | None, frames: int | None) -> "list[Bucket]":
    """Return the shape that the options give, or those of the clips in the latents table.

    Raises:
        ManifestError: the options give no valid shape, or none where there is no table.
        TableError: the table has no rows.
    """
    from pydantic import ValidationError

    from pusa.data.reader import Table
    from pusa.data.writer import INDEX
    from pusa.manifest.models import Bucket
    from pusa.system.strict import list_problems

    if bool(size) != bool(frames):
        raise ManifestError("--size and --frames go together: --size 848x480 --frames 163")
    if size:
        try:
            return [Bucket(width=size[0], height=size[1], num_frames=frames)]
        except ValidationError as error:
            raise ManifestError("--size, --frames: " + "; ".join(list_problems(error, Bucket))) from error
    if not (table / INDEX).exists():
        raise ManifestError(f"{table} is not a latents table yet; give the shape of its clips: --size WxH --frames N")
    names = Table.open(table, "rows").read("rows", ["bucket"])["bucket"].unique().to_pylist()
    if not names:
        raise TableError(f"{table} has no rows; there is nothing to train with")
    shapes = sorted(tuple(map(int, name.split("x"))) for name in names)
    return [Bucket(width=width, height=height, num_frames=frames) for width, height, frames in shapes]
