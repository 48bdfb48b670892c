"""What may not change between a run and its resumption, and what may if it is said: `--override KEY=VALUE`."""

from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError

from pusa.data.reader import Table
from pusa.errors import ManifestError, TableError, TrainingError
from pusa.manifest.models import FinetuneManifest
from pusa.system.strict import problems
from pusa.system.text import describe_unknown_key
from pusa.weights.model import Model

Recipe = dict[str, Any]

# Where things lie, how long it goes on and how the work is done: the steps that are made stay the same.
FREE = {
    "kind", "base", "latents", "steps", "checkpoint_every", "keep_checkpoints", "probe", "loader_workers", "parallel",
    "micro_batch_size", "recompute", "compile", "non_finite_limit",
}  # fmt: skip
# What a run may go on with another value of: it makes other steps from there on, and the checkpoints say so.
OVERRIDABLE = {
    "learning_rate", "warmup_steps", "decay", "weight_decay", "clip_norm", "caption_dropout", "levels", "density",
    "weighting", "precision", "steps", "latents",
}  # fmt: skip
PACKAGES = ("pusa", "torch", "diffusers", "transformers", "peft", "safetensors")


def with_overrides(manifest: FinetuneManifest, overrides: Mapping[str, str]) -> FinetuneManifest:
    """The manifest with other values.

    Raises:
        ManifestError: a key is unknown or may not be overridden, or a value is not allowed.
    """
    for key in overrides:
        if key in FREE - OVERRIDABLE - {"kind"}:
            raise ManifestError(f"--override {key}: it may be changed in the manifest itself, at any time")
        if key not in OVERRIDABLE:
            allowed = f"a run cannot change it; allowed are {', '.join(sorted(OVERRIDABLE))}"
            known = key in FinetuneManifest.model_fields
            raise ManifestError(f"--override {key}: {allowed if known else describe_unknown_key(key, OVERRIDABLE)}")
    try:
        values = {key: yaml.safe_load(text) for key, text in overrides.items()}
        return FinetuneManifest.model_validate({**manifest.model_dump(exclude_unset=True), **values})
    except ValidationError as error:
        raise ManifestError("--override " + "; ".join(problems(error, FinetuneManifest))) from error
    except yaml.YAMLError as error:
        raise ManifestError(f"--override {dict(overrides)}: {error}") from error


def recipe_of(manifest: FinetuneManifest, model: Model, table: Table, compute: torch.dtype) -> Recipe:
    """What decides the steps, as JSON.

    Raises:
        TableError: the latents were made with other encoders than the base has.
    """
    _require_same_encoders(table, model)
    settings = manifest.model_dump(mode="json", exclude=FREE)
    if manifest.decay == "cosine":
        settings["steps"] = manifest.steps  # the learning rate depends on it
    return {
        **settings,
        "precision": str(compute).removeprefix("torch."),
        "base": model.fingerprints("transformer")["transformer"],
        "latents": table.fingerprint,
        "latent_space": model.space_name,
        "backbone": manifest.base.backbone,
    }


def versions() -> dict[str, str]:
    """Of the packages that a result depends on."""
    return {name: version(name) for name in PACKAGES}


def require_same(theirs: Recipe, ours: Recipe, overridden: Collection[str], where: Path, table: Path) -> None:
    """Refuse to go on with another recipe, or with another `table` of latents.

    Raises:
        TrainingError: what differs is not among what was overridden; every difference is named with both values.
    """
    allowed = set(overridden)
    if "decay" in overridden and theirs.get("decay") != ours.get("decay"):
        allowed.add("steps")  # only one of the two depends on it
    wrong = [key for key in sorted({*ours, *theirs} - allowed) if theirs.get(key) != ours.get(key)]
    if wrong:
        told = "; ".join(f"{key}: {theirs.get(key)!r} there, {ours.get(key)!r} here" for key in wrong)
        named = {**ours, "latents": table}
        new = " ".join(f"--override {key}={named[key]}" for key in wrong if key in ours)
        old = " ".join(f"--override {key}={theirs[key]}" for key in wrong if key in theirs)
        hint = f", or say how it goes on: {new}" if set(wrong) <= OVERRIDABLE else ""
        before = old if "latents" not in wrong else "with the table that it had, in the manifest"
        hint += f", or as before: {before}" if hint else ""
        raise TrainingError(f"{where} is of another recipe ({told}); use another --run-dir{hint}")


def overridden(before: Recipe, ours: Recipe, keys: Collection[str], step: int) -> list[dict[str, Any]]:
    """For the record: what is other from this step on."""
    return [
        {"step": step, "key": key, "from": before.get(key), "to": ours[key]}
        for key in sorted(keys)
        if key in ours and before.get(key) != ours[key]
    ]


def _require_same_encoders(table: Table, model: Model) -> None:
    encoders = model.backbone.family.encoders
    theirs, ours = table.fact("made_with"), model.fingerprints(*encoders)
    for part in encoders:
        if theirs[part] != ours[part]:
            raise TableError(f"{table.folder} was made with {part} {theirs[part]}; the base has {part} {ours[part]}")
