"""`pusa plan MANIFEST`: whether what a manifest asks for fits into memory, before anything is loaded."""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from flows.options import count, positive
from pusa.errors import ManifestError, TableError

if TYPE_CHECKING:
    from torch import dtype

    from pusa.manifest.models import Bucket, FinetuneManifest, GenerateManifest, Manifest

HELP = "say what a generate or finetune manifest needs of each GPU, and whether it fits; nothing is loaded"


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `pusa plan` takes."""
    parser.add_argument("manifest", type=Path, help="a YAML file of kind generate or finetune")
    parser.add_argument("--gpu-memory", type=positive, metavar="GIB", help="of another device than this, in bf16")
    training = parser.add_argument_group("for a finetune manifest")
    training.add_argument("--gpus", type=count, metavar="N", help="instead of its parallel.processes")
    training.add_argument("--size", type=_size, metavar="WxH", help="of the clips, where there is no latents table yet")
    training.add_argument("--frames", type=count, metavar="N", help="of the clips, with --size")
    training.add_argument("--run-dir", type=Path, help="where the latents table is; default runs/<manifest's folder>")


def lines(manifest: "Manifest", run_dir: Path, options: argparse.Namespace) -> Iterator[str]:
    """What there is to say, as it is found.

    Raises:
        ManifestError: nothing can be planned for a manifest of this kind, or with these options.
    """
    import torch

    from pusa.backbones.dry_run import GIB, memory_of
    from pusa.weights.model import default_device, default_dtype

    device = default_device()
    dtype = torch.bfloat16 if options.gpu_memory else default_dtype(device)
    memory = int(options.gpu_memory * GIB) if options.gpu_memory else memory_of(device)
    if manifest.kind == "generate":
        yield from _of_jobs(manifest, options, dtype, memory)
    elif manifest.kind == "finetune":
        yield from _of_training(manifest, run_dir, options, dtype, memory)
    else:
        raise ManifestError(f"{options.manifest}: kind is {manifest.kind!r}; allowed are generate and finetune")


def _of_jobs(manifest: "GenerateManifest", options: argparse.Namespace, dtype: "dtype", memory: int) -> Iterator[str]:
    from pusa.generate.plan import plan

    if given := [name for name in ("gpus", "size", "frames") if getattr(options, name)]:
        raise ManifestError(f"--{given[0]} is for a finetune manifest; {options.manifest} is one of kind generate")
    yield f"{manifest.model.weights}, {str(dtype).removeprefix('torch.')}, {len(manifest.jobs)} jobs"
    yield plan(manifest, dtype).table(memory, manifest.model.offload)


def _of_training(
    manifest: "FinetuneManifest", run_dir: Path, options: argparse.Namespace, dtype: "dtype", memory: int
) -> Iterator[str]:
    import torch

    from pusa.finetune.plan import report

    if options.gpus:
        parallel = manifest.parallel.model_copy(update={"processes": options.gpus})
        manifest = manifest.model_copy(update={"parallel": parallel})
    if manifest.precision:
        dtype = getattr(torch, manifest.precision)
    if not (options.gpu_memory or torch.cuda.is_available()):
        memory //= manifest.parallel.processes  # of one machine's memory
    yield from report(manifest, _shapes(manifest.latents or run_dir / "latents", options), dtype, memory)


def _shapes(table: Path, options: argparse.Namespace) -> "list[Bucket]":
    """Those of the clips in the table, or the one that was said.

    Raises:
        ManifestError: there is no table, and no shape that may be was said.
        TableError: there is nothing in the table.
    """
    from pydantic import ValidationError

    from pusa.data.reader import Table
    from pusa.data.writer import INDEX
    from pusa.manifest.models import Bucket
    from pusa.system.strict import list_problems

    if bool(options.size) != bool(options.frames):
        raise ManifestError("--size and --frames go together: --size 848x480 --frames 163")
    if options.size:
        width, height = options.size
        try:
            return [Bucket(width=width, height=height, num_frames=options.frames)]
        except ValidationError as error:
            raise ManifestError("--size, --frames: " + "; ".join(list_problems(error, Bucket))) from error
    if not (table / INDEX).exists():
        raise ManifestError(f"{table} is no latents table yet; say what its clips will be: --size WxH --frames N")
    names = Table.open(table, "rows").read("rows", ["bucket"])["bucket"].unique().to_pylist()
    if not names:
        raise TableError(f"{table} has no rows; there is nothing to train with")
    sizes = sorted(tuple(map(int, name.split("x"))) for name in names)
    return [Bucket(width=width, height=height, num_frames=frames) for width, height, frames in sizes]


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text} is not WIDTHxHEIGHT")
    return int(match[1]), int(match[2])
