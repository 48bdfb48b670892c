"""Read the models at a path with their layouts, recognised by tensor names and shapes, without torch."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pusa.backbones import all_families
from pusa.backbones.family import LayoutFile, Rule
from pusa.backbones.settings import read_small
from pusa.errors import WeightsError
from pusa.system.files import read_json
from pusa.system.text import join_names, preview
from pusa.weights.tensors import StoredTensor, Tensors, concatenate, parse_unique, read_file, read_sharded

OPTIMIZER = "training.safetensors"  # lies beside the model in a checkpoint
RECORD = "pusa"  # the key of a fine-tune's record in a file's metadata
LORA_DELTAS = (".diff", ".diff_b", ".diff_m")  # how the names end under which a LoRA has whole deltas
RECORD_FILE = "checkpoint.json"  # the record of a checkpoint, where its files have none


@dataclass(frozen=True)
class StoredModel:
    """One model on disk: a file, or a folder with its config and shards.

    `layout` is "diffusers", "lora", "unknown", or the name of a family's original layout. `files` are the files of that
    original layout: the one that this model is, or those whose tensors it has under diffusers' names.
    """

    path: Path
    tensors: Tensors
    metadata: dict[str, str]
    layout: str
    files: tuple[LayoutFile, ...] = ()

    @property
    def part(self) -> str | None:
        """Return which part of a model this is, or None if unknown."""
        return self.files[0].part if self.files else None

    def in_diffusers_names(self) -> Tensors:
        """Return the tensors by diffusers' names.

        Raises:
            WeightsError: a tensor is missing or unknown, or the tensors are those of several files of a layout.
        """
        if self.layout in ("diffusers", "lora", "unknown"):
            return self.tensors
        file, *others = self.files
        if others:
            both = " and ".join(known.name for known in self.files)
            raise WeightsError(f"{self.path} has tensors of {both}; expected those of one file")
        rules = _rules(file, self, {rule.original for rule in file.rules(set(self.tensors))})
        return dict(pair for rule in rules for pair in to_diffusers(rule, self.tensors[rule.original]))

    def in_original_names(self, file: LayoutFile) -> Tensors:
        """Return the tensors that `file` holds, by the names of the original layout.

        Raises:
            WeightsError: a tensor is missing or unknown.
        """
        if self.layout not in ("diffusers", "lora", "unknown"):
            return self.tensors
        others = tuple(other.prefix for other in self.files if other is not file)
        own = {name: stored for name, stored in self.tensors.items() if not name.startswith(others)}
        expected = {name for rule in file.rules(set(own)) for name in rule.diffusers}
        rules = _rules(file, replace(self, tensors=own), expected)
        return {rule.original: to_original(rule, own) for rule in rules}

    def config(self) -> dict[str, Any]:
        """Return the model's configuration: that of its config.json, or the one derived from its tensors' shapes.

        Raises:
            WeightsError: it cannot be derived.
        """
        path = self.path / "config.json"
        if self.path.is_dir() and path.exists():
            return read_small(path)
        if not self.files:
            raise WeightsError(f"{self.path} has no config.json, and its tensors are not of a known family")
        shapes = {name: stored.shape for name, stored in self.in_diffusers_names().items()}
        try:
            return {name: value for file in self.files for name, value in file.config(shapes, self.metadata).items()}
        except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise WeightsError(
                f"the configuration cannot be derived from the tensors of {self.path}: {preview(error)}"
            ) from error

    def record(self) -> dict[str, Any]:
        """Return the record of the fine-tune: latent space, backbone, step, recipe; empty if there is none."""
        record = self._own_record() if RECORD in self.metadata else self._checkpoints_record()
        recipe = record.get("recipe")
        facts = {key: recipe.get(key) for key in ("latent_space", "backbone")} if isinstance(recipe, dict) else {}
        return {**facts, **record}

    def _own_record(self) -> dict[str, Any]:
        """Return the record in the files' metadata, which stays with them wherever they are copied."""
        try:
            record = parse_unique(self.metadata[RECORD])
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise WeightsError(f"{self.path}: its metadata's {RECORD!r} is not a JSON object")
        return record

    def _checkpoints_record(self) -> dict[str, Any]:
        """Return the record in the checkpoint around the folder, for files without a record of their own."""
        path = self.path.parent / RECORD_FILE
        if not (self.path.is_dir() and path.is_file()):
            return {}
        checkpoint = read_json(path)
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("recipe"), dict):
            raise WeightsError(f"{path} is incomplete: it has no recipe")
        return {key: value for key, value in checkpoint.items() if key not in ("files", "sha256")}


def find_models(path: Path) -> list[StoredModel]:
    """Read every model at a path: a safetensors file, a folder with one model, or a folder of such folders and files.

    Raises:
        WeightsError: there is none, or one is incomplete.
    """
    if path.is_file():
        return [read_model(path)]
    if not path.is_dir():
        raise WeightsError(f"{path} is neither a file nor a folder")
    inner = [path, *sorted(inner for inner in path.iterdir() if inner.is_dir())]
    folders = [folder for folder in inner if (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))]
    files = [] if path in folders else sorted([*path.glob("[!.]*.safetensors"), *path.glob("lora/[!.]*.safetensors")])
    files = [file for file in files if file.name != OPTIMIZER]
    models = [read_model(place) for place in folders + files]
    if not models:
        raise WeightsError(
            f"{path} and the folders in it have no weights; expected a safetensors file, or a folder with config.json "
            "and safetensors files"
        )
    return models


def read_model(path: Path) -> StoredModel:
    """Read the model of one file, or of one folder with a config.

    Raises:
        WeightsError: the file is not a safetensors file, or is incomplete.
    """
    tensors, metadata = read_sharded(path) if path.is_dir() else read_file(path)
    for family in all_families():
        tensors = _without_prefix(path, tensors, family.layout.prefix)
    model = StoredModel(path, tensors, metadata, "diffusers" if path.is_dir() else "unknown")
    if any("lora_" in name or name.endswith(LORA_DELTAS) for name in tensors):
        return replace(model, layout="lora")
    for layout in (family.layout for family in all_families()):
        if files := tuple(file for file in layout.files if file.mark in tensors):
            return replace(model, layout=layout.name, files=files)
        if files := tuple(file for file in layout.files if file.diffusers_mark in tensors):
            return replace(model, layout="diffusers", files=files)
    return model


def _without_prefix(path: Path, tensors: Tensors, prefix: str) -> Tensors:
    """Remove the prefix that some tools write before every name."""
    named = {name.removeprefix(prefix): stored for name, stored in tensors.items()}
    if len(named) != len(tensors):
        raise WeightsError(f"{path} has the same tensor name both with and without the prefix {prefix!r}")
    return named


def _rules(file: LayoutFile, model: StoredModel, expected: set[str]) -> Iterator[Rule]:
    """Yield the rules of a file, after a check that the model has exactly the `expected` names."""
    missing, unexpected = sorted(expected - set(model.tensors)), sorted(set(model.tensors) - expected)
    if misfits := list_misfits(missing=missing, unexpected=unexpected):
        raise WeightsError(f"{model.path} is not a complete {file.name}: {misfits}")
    yield from file.rules(set(model.tensors))


def list_misfits(**names: list[str]) -> str:
    """Return each problem with the names of its tensors, as text; "" if there are none."""
    return "; ".join(f"{problem} {join_names(tensors)}" for problem, tensors in names.items() if tensors)


def to_diffusers(rule: Rule, stored: StoredTensor) -> list[tuple[str, StoredTensor]]:
    """Return diffusers' name and content of each tensor that an original one consists of."""
    if rule.swapped:
        stored = concatenate(reversed(stored.split(2)))
    parts = stored.split(len(rule.diffusers)) if len(rule.diffusers) > 1 else [stored]
    return list(zip(rule.diffusers, parts, strict=True))


def to_original(rule: Rule, tensors: Tensors) -> StoredTensor:
    """Return the original tensor that some of diffusers' are parts of."""
    stored = concatenate(tensors[name] for name in rule.diffusers)
    return concatenate(reversed(stored.split(2))) if rule.swapped else stored
