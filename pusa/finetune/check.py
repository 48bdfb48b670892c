"""What the trainer would refuse of a finetune manifest whose values are right each by itself. Loads no weights."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from pusa.backbones import find_family
from pusa.backbones.context import Imagined
from pusa.data.latents import Latents
from pusa.data.reader import Table
from pusa.data.writer import INDEX
from pusa.errors import TableError, error_messages
from pusa.finetune.plan import unbuilt, uneven
from pusa.finetune.recipe import recipe_of, recorded_recipe, require_same
from pusa.finetune.trainable import choose
from pusa.finetune.validation import require_device
from pusa.manifest.models import FinetuneManifest, ModelSpec
from pusa.manifest.training import Validation
from pusa.system.files import read_json
from pusa.weights.hub import PREFIX, HubName, cached_file
from pusa.weights.model import Model, default_device, default_dtype
from pusa.weights.resolve import require


def check_finetune(manifest: FinetuneManifest, run_dir: Path, note: Callable[[str], None]) -> Iterator[str]:
    """A line for each thing that the trainer, or its probe, would refuse; nothing is downloaded.

    Args:
        manifest: its paths located.
        run_dir: of the run, whose latents an earlier stage may have yet to make.
        note: is told what cannot be looked at yet.
    """
    yield from error_messages(lambda: require_device(manifest.validation or Validation()))
    lacking = error_messages(lambda: require(manifest.base))
    yield from lacking
    latents = None
    try:
        latents = _latents(manifest.latents or run_dir / "latents", run_dir, note)
    except TableError as error:
        yield str(error)
    yield from uneven(manifest, _latent_frames(manifest, latents) if latents else None)
    if not lacking:
        yield from _check_network(manifest, note)
    if latents and not lacking:
        yield from _check_recipe(manifest, run_dir, latents, note)


def _latents(folder: Path, run_dir: Path, note: Callable[[str], None]) -> Latents | None:
    """The latents, unless they are this run's and yet to be made."""
    if not (folder / INDEX).exists() and folder.absolute().is_relative_to(run_dir.absolute()):
        note(f"latents {folder} are not there yet")
        return None
    table = Table.open(folder, "rows")
    if not table.rows("rows"):
        raise TableError(f"{folder} has no rows; there is nothing to train with")
    return Latents(table)


def _latent_frames(manifest: FinetuneManifest, latents: Latents) -> int:
    """Those of the shortest clips."""
    lengths = [int(shape.split("x")[2]) for shape in latents.buckets]  # WIDTHxHEIGHTxFRAMES
    return find_family(manifest.base.backbone).geometry.latent_frames(min(lengths))


def _check_network(manifest: FinetuneManifest, note: Callable[[str], None]) -> Iterator[str]:
    """Whether what is to learn is there, and the heads can be shared."""
    if not _is_configured(manifest.base):
        note("names in `train`, and parallel.context, are compared with the base once it is downloaded")
        return
    learning = error_messages(lambda: choose(unbuilt(manifest), manifest.train))
    shared = error_messages(lambda: unbuilt(manifest).share_frames(Imagined(0, manifest.parallel.context, None)))
    yield from dict.fromkeys([*learning, *shared])  # a base that cannot be built is told once


def _check_recipe(
    manifest: FinetuneManifest, run_dir: Path, latents: Latents, note: Callable[[str], None]
) -> Iterator[str]:
    base = manifest.base
    names = (base.weights, base.checkpoint, base.lora, base.text_encoder)
    if any(name and name.startswith(PREFIX) for name in names):
        note("what the latents were made with is compared with the base once it is downloaded")
        return
    yield from error_messages(lambda: _require_same_recipe(manifest, run_dir, latents))


def _require_same_recipe(manifest: FinetuneManifest, run_dir: Path, latents: Latents) -> None:
    """As the last checkpoint's, if there is one; and that the latents are of the base."""
    device = default_device()
    compute = getattr(torch, manifest.precision) if manifest.precision else default_dtype(device)
    recipe = recipe_of(manifest, Model(manifest.base, "cpu"), latents.table, compute)
    last = run_dir / "checkpoints/last"
    found = read_json(last / "checkpoint.json")
    if isinstance(found, dict) and isinstance(found.get("recipe"), dict):
        require_same(recorded_recipe(found), recipe, (), last.resolve(), latents.table.folder)


def _is_configured(base: ModelSpec) -> bool:
    """Whether the transformer's shapes can be told without a download."""
    name = base.checkpoint or base.weights
    if not name.startswith(PREFIX):
        return True
    hub = HubName.parse(name)
    return cached_file(hub if hub.file else replace(hub, file="transformer/config.json")) is not None
