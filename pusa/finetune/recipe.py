"""Compare a run's recipe with its last checkpoint's: which keys must stay, which `--override KEY=VALUE` may change."""

from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from pydantic import ValidationError
from pydantic_core import to_jsonable_python

from pusa.data.reader import Table
from pusa.errors import ManifestError, TableError, TrainingError
from pusa.finetune.checkpoint import RECORD
from pusa.manifest.common import OPERATION
from pusa.manifest.models import FinetuneManifest
from pusa.manifest.parsing import parse_yaml
from pusa.system.files import read_object
from pusa.system.strict import list_problems
from pusa.system.text import describe_unknown_key, preview
from pusa.weights.model import Model

Recipe = dict[str, Any]

# Keys that may change at any time: paths, the length of the run and how the work is done. The steps stay the same.
ALWAYS_CHANGEABLE = {
    "kind", "base", "latents", "steps", "checkpoint_every", "keep_checkpoints", "validation", "loader_workers",
    "parallel", "micro_batch_size", "activation_checkpointing", "compile", "non_finite_limit", *OPERATION,
}  # fmt: skip
# Keys that --override may change when a run is resumed: later steps differ, and the checkpoints record the change.
OVERRIDABLE = {
    "learning_rate", "warmup_steps", "lr_schedule", "weight_decay", "max_grad_norm", "caption_dropout", "levels",
    "density", "level_range", "weighting", "precision", "steps", "latents",
}  # fmt: skip
HELD_OUT = "held_out"  # in a recipe: the share of the clips that never train; absent where all train
PACKAGES = ("pusa", "torch", "diffusers", "transformers", "peft", "safetensors")


def with_overrides(manifest: FinetuneManifest, overrides: Mapping[str, str]) -> FinetuneManifest:
    """Return the manifest with the values of `overrides`, which are YAML.

    Raises:
        ManifestError: a key is unknown or cannot be overridden, or a value is not allowed.
    """
    for key in overrides:
        if key in ALWAYS_CHANGEABLE - OVERRIDABLE - {"kind", "base"}:
            raise ManifestError(f"--override {key}: change it in the manifest itself, at any time")
        if key not in OVERRIDABLE:
            allowed = f"a run cannot change it; allowed are {', '.join(sorted(OVERRIDABLE))}"
            known = key in FinetuneManifest.model_fields
            raise ManifestError(f"--override {key}: {allowed if known else describe_unknown_key(key, OVERRIDABLE)}")
    if not overrides:
        return manifest
    try:
        values = {key: parse_yaml(text, f"--override {key}={text}") for key, text in overrides.items()}
        return FinetuneManifest.model_validate({**manifest.model_dump(exclude_unset=True), **values})
    except ValidationError as error:
        raise ManifestError("--override " + "; ".join(list_problems(error, FinetuneManifest))) from error


def with_new_clips(manifest: FinetuneManifest, run_dir: Path) -> dict[str, str]:
    """Return the overrides with which a training goes on for the manifest's `steps` each time its table has changed.

    Its length is a whole number of times `steps`: one time more than the last checkpoint has, if that has another
    table, else the number that it was on its way to. So a call that is repeated after a kill asks for the same.

    Raises:
        TableError: there is no latents table.
    """
    record = read_object((run_dir / "checkpoints/last").resolve() / RECORD)
    step = record.get("step")
    if type(step) is not int or not isinstance(record.get("recipe"), dict):
        return {}  # the first training
    folder = (manifest.latents or run_dir / "latents").absolute()
    is_changed = Table.open(folder, "rows").fingerprint != recorded_recipe(record).get("latents")
    times = max(1, -(-step // manifest.steps))
    if step == times * manifest.steps and is_changed:
        times += 1
    return {"steps": str(times * manifest.steps), "latents": str(folder)}


def rename_overrides(overrides: Mapping[str, str], warn: bool) -> dict[str, str]:
    """Return the overrides with old keys under their new names.

    Raises:
        ManifestError: a key is overridden under both names.
    """
    try:
        return FinetuneManifest.rename_old_keys(overrides, warn)
    except ValueError as error:
        raise ManifestError(f"--override: {error}") from error


def recipe_of(manifest: FinetuneManifest, model: Model, table: Table, compute: torch.dtype) -> Recipe:
    """Return everything that decides the steps, as JSON.

    Raises:
        TableError: the latents were made with other encoders than the base has.
    """
    require_encoders(table, model)
    settings = manifest.model_dump(mode="json", exclude=ALWAYS_CHANGEABLE)
    if manifest.lr_schedule == "cosine":
        settings["steps"] = manifest.steps  # the learning rate depends on it
    if manifest.validation is not None and manifest.validation.held_out:
        settings[HELD_OUT] = manifest.validation.held_out
    return {
        **settings,
        "precision": str(compute).removeprefix("torch."),
        "base": model.fingerprints(manifest.part)[manifest.part],
        "latents": table.fingerprint,
        "latent_space": model.space_of(manifest.part),
        "backbone": manifest.base.backbone,
    }


def require_encoders(table: Table, model: Model) -> None:
    """Refuse latents that were made with other encoders than the base has.

    Raises:
        TableError: with both fingerprints.
    """
    encoders = model.backbone.family.encoders
    made_with, fingerprints = table.fact("made_with"), model.fingerprints(*encoders)
    for part in encoders:
        made = made_with.get(part) if isinstance(made_with, dict) else None
        if made != fingerprints[part]:
            raise TableError(
                f"{table.folder} was made with {part} {preview(made)}; the base has {part} {fingerprints[part]}"
            )


def recorded_recipe(record: Mapping[str, Any]) -> Recipe:
    """Return the recipe of a checkpoint's record. Older checkpoints have old keys in it, and lack new ones.

    A run that was made before a key existed was made as the key's default says.
    """
    recipe = FinetuneManifest.rename_old_keys(record["recipe"], warn=False)
    for key, field in FinetuneManifest.model_fields.items():
        if key not in {*recipe, *ALWAYS_CHANGEABLE} and field.default is not None and not field.is_required():
            recipe[key] = to_jsonable_python(field.get_default(call_default_factory=True))
    return recipe


def require_same_table(table: Table, expected: str) -> None:
    """Refuse a table that is not the first process's: each of them opens it, and a run may replace it in between.

    Args:
        table: as this process opened it.
        expected: the fingerprint of the first process's.

    Raises:
        TableError: it is another one.
    """
    if table.fingerprint != expected:
        raise TableError(
            f"{table.folder} was changed while the training started: the first process has {expected}, "
            f"another one {table.fingerprint}; wait until no run writes it, then start again"
        )


def versions() -> dict[str, str]:
    """Return the versions of the packages that a result depends on."""
    return {name: version(name) for name in PACKAGES}


def require_same(
    recorded: Recipe, current: Recipe, overridden: Collection[str], checkpoint: Path, latents: Path
) -> None:
    """Refuse to resume with another recipe.

    Args:
        recorded: the recipe of the last checkpoint.
        current: the recipe of this run.
        overridden: keys that may differ.
        checkpoint: named in the error.
        latents: the folder of this run's table, which an override is suggested for.

    Raises:
        TrainingError: other keys differ; all of them are named with both values.
    """
    there, here = (recipe.get(HELD_OUT) or 0 for recipe in (recorded, current))
    if there != here:
        raise TrainingError(
            f"{checkpoint} was trained with validation.held_out {there:g}, the manifest has {here:g}; with another "
            "share, clips that have trained might be measured: set it back, or use another --run-dir"
        )
    allowed = set(overridden)
    if "lr_schedule" in overridden and recorded.get("lr_schedule") != current.get("lr_schedule"):
        allowed.add("steps")  # part of the recipe under only one of the two schedules
    differing = [key for key in differing_keys(recorded, current) if key not in allowed]
    if not differing:
        return
    values = "; ".join(f"{key}: {recorded.get(key)!r} there, {current.get(key)!r} here" for key in differing)
    fixed = [key for key in differing if key not in OVERRIDABLE]
    if fixed:
        hint = f"; a run cannot change {', '.join(fixed)}: use another --run-dir"
    else:
        as_given = {**current, "latents": latents}
        change = " ".join(f"--override {quote(f'{key}={as_given[key]}')}" for key in differing if key in current)
        keep = " ".join(f"--override {quote(f'{key}={recorded[key]}')}" for key in differing if key in recorded)
        if "latents" in differing:
            keep = "name the table that it had in the manifest"
        hint = f"; use another --run-dir, or resume with the change: {change}, or as before: {keep}"
    raise TrainingError(f"{checkpoint} has another recipe ({values}){hint}")


def differing_keys(recorded: Recipe, current: Recipe) -> list[str]:
    """Return the keys whose values differ between two recipes, sorted."""
    return [key for key in sorted({*current, *recorded}) if recorded.get(key) != current.get(key)]


def changed_keys(before: Recipe, current: Recipe, overridden: Collection[str], step: int) -> list[dict[str, Any]]:
    """Return what the overrides change from this step on, for the checkpoints' record."""
    return [
        {"step": step, "key": key, "from": before.get(key), "to": current[key]}
        for key in sorted(overridden)
        if key in current and before.get(key) != current[key]
    ]
