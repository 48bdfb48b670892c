"""Check a valid finetune manifest for what the trainer would refuse. Loads no weights."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from pusa.backbones import find_family
from pusa.backbones.context import MetaContext
from pusa.backbones.family import Geometry
from pusa.data.latents import Latents
from pusa.data.reader import Table
from pusa.data.writer import INDEX
from pusa.errors import TableError, error_messages
from pusa.finetune.batch import density_of
from pusa.finetune.checkpoint import RECORD
from pusa.finetune.matrix import cells_of, notes_on
from pusa.finetune.plan import division_problems, empty_transformer
from pusa.finetune.recipe import recipe_of, recorded_recipe, require_encoders, require_same
from pusa.finetune.split import split_clips
from pusa.finetune.trainable import set_trainable
from pusa.finetune.validation import require_device, settings_of
from pusa.manifest.models import FinetuneManifest
from pusa.system.files import read_object
from pusa.weights.hub import HUB_PREFIX, HubName, cached_file
from pusa.weights.model import Model, default_device, default_dtype
from pusa.weights.resolve import require_model


def check_finetune(manifest: FinetuneManifest, run_dir: Path, note: Callable[[str], None]) -> Iterator[str]:
    """Yield a line for each thing that the trainer or its validation would refuse. Nothing is downloaded.

    Args:
        manifest: with absolute paths.
        run_dir: of the run; its latents may not be made yet.
        note: is called with what cannot be checked yet.
    """
    yield from error_messages(lambda: require_device(settings_of(manifest)))
    yield from error_messages(lambda: density_of(manifest))
    base_problems = error_messages(lambda: require_model(manifest.base))
    yield from base_problems
    latents = latent_frames = None
    try:
        latents = _open_latents(manifest.latents or run_dir / "latents", run_dir, note)
    except TableError as error:
        yield str(error)
    if latents:
        shortest = min(int(shape.split("x")[2]) for shape in latents.buckets)  # WIDTHxHEIGHTxFRAMES
        geometry = find_family(manifest.base.backbone).geometry
        latent_frames = geometry.latent_frames(shortest)
        yield from error_messages(lambda: _check_held_out(manifest, latents, geometry, note))
    yield from division_problems(manifest, latent_frames)
    if base_problems:
        return
    if _is_configured(manifest):
        trained = error_messages(lambda: set_trainable(empty_transformer(manifest), manifest.train))
        context = MetaContext(0, manifest.parallel.context, None)
        shared = error_messages(lambda: empty_transformer(manifest).share_frames(context))
        yield from dict.fromkeys([*trained, *shared])  # a base that cannot be built is named once
    else:
        note("names in `train`, and parallel.context, are compared with the base once it is downloaded")
    base = manifest.base
    names = (
        base.weights,
        base.checkpoint_of(manifest.part),
        base.text_encoder,
        base.vae,
        *(lora.weights for lora in base.adapters),
    )
    if latents and any(name and name.startswith(HUB_PREFIX) for name in names):
        note("the encoders of the latents are compared with the base once it is downloaded")
    elif latents:
        yield from error_messages(lambda: _require_same_recipe(manifest, run_dir, latents))


def _open_latents(folder: Path, run_dir: Path, note: Callable[[str], None]) -> Latents | None:
    """Open the latents table; return None where it is this run's and not made yet."""
    if not (folder / INDEX).exists() and folder.absolute().is_relative_to(run_dir.absolute()):
        note(f"latents {folder} do not exist yet")
        return None
    table = Table.open(folder, "rows")
    if not table.rows("rows"):
        raise TableError(f"{folder} has no rows; there is nothing to train with")
    return Latents(table)


def _check_held_out(
    manifest: FinetuneManifest, latents: Latents, geometry: Geometry, note: Callable[[str], None]
) -> None:
    """Refuse a split without a clip on one side, and held-out clips that cannot be measured."""
    split = split_clips(manifest.validation, latents, lambda folder: Latents(Table.open(folder, "rows")))
    if manifest.validation and manifest.validation.every:
        cells_of(manifest, split, geometry)
        for line in notes_on(manifest, split, geometry):
            note(line)


def _require_same_recipe(manifest: FinetuneManifest, run_dir: Path, latents: Latents) -> None:
    """Refuse latents of other encoders than the base's, and another recipe than the last checkpoint's."""
    device = default_device()
    compute = getattr(torch, manifest.precision) if manifest.precision else default_dtype(device)
    model = Model(manifest.base, "cpu")
    recipe = recipe_of(manifest, model, latents.table, compute)
    if manifest.validation is not None and (other := manifest.validation.latents) is not None:
        require_encoders(Table.open(other, "rows"), model)
    last = (run_dir / "checkpoints/last").resolve()  # once: a training may set the link meanwhile
    record = read_object(last / RECORD)
    if isinstance(record.get("recipe"), dict):
        require_same(recorded_recipe(record), recipe, (), last, latents.table.folder)


def _is_configured(manifest: FinetuneManifest) -> bool:
    """Return whether the configuration of the transformer to train is on this machine."""
    name = manifest.base.checkpoint_of(manifest.part) or manifest.base.weights
    if not name.startswith(HUB_PREFIX):
        return True
    hub = HubName.parse(name)
    return cached_file(hub if hub.file else replace(hub, file=f"{manifest.part}/config.json")) is not None
