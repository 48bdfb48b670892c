"""What weights lie at a path: each model of it with its layout, read off names and shapes. No torch here."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pusa.backbones import all_families
from pusa.backbones.family import LayoutFile, Rule
from pusa.errors import WeightsError
from pusa.system.files import read_json
from pusa.weights.tensors import StoredTensor, Tensors, concatenate, read_file, read_sharded

OPTIMIZER = "training.safetensors"  # lies beside a checkpoint's model
RECORD = "pusa"  # the key, in a file's metadata, of what a fine-tune says of itself
RECORD_FILE = "checkpoint.json"  # of a checkpoint: the same


@dataclass(frozen=True)
class StoredModel:
    """One model on disk: a file, or a folder with its config and shards.

    `layout` is "diffusers", "lora", "unknown", or the name of a family's original layout. `files` are the files of that
    original layout that it is (one), or whose tensors it holds under diffusers' names.
    """

    path: Path
    tensors: Tensors
    metadata: dict[str, str]
    layout: str
    files: tuple[LayoutFile, ...] = ()

    @property
    def part(self) -> str | None:
        """Which part of a model this is, where it is known to us."""
        return self.files[0].part if self.files else None

    def in_diffusers_names(self) -> Tensors:
        """The same tensors by diffusers' names.

        Raises:
            WeightsError: any is missing or not known.
        """
        if self.layout in ("diffusers", "lora", "unknown"):
            return self.tensors
        (file,) = self.files
        rules = _rules(file, self, {rule.original for rule in file.rules(set(self.tensors))})
        return dict(pair for rule in rules for pair in _apart(rule, self.tensors[rule.original]))

    def in_original_names(self, file: LayoutFile) -> Tensors:
        """Return the tensors that `file` holds, by the names of the original layout.

        Raises:
            WeightsError: any is missing or not known.
        """
        if self.layout not in ("diffusers", "lora", "unknown"):
            return self.tensors
        others = tuple(other.prefix for other in self.files if other is not file)
        own = {name: stored for name, stored in self.tensors.items() if not name.startswith(others)}
        wanted = {name for rule in file.rules(set(own)) for name in rule.diffusers}
        rules = _rules(file, replace(self, tensors=own), wanted)
        return {rule.original: _together(rule, own) for rule in rules}

    def config(self) -> dict[str, Any]:
        """The model's configuration: its own, or what the shapes of its tensors say.

        Raises:
            WeightsError: they do not say it.
        """
        own = read_json(self.path / "config.json") if self.path.is_dir() else None
        if own:
            return own
        if not self.files:
            raise WeightsError(f"{self.path} is of no family known here, and has no config.json")
        shapes = {name: stored.shape for name, stored in self.in_diffusers_names().items()}
        try:
            return {name: value for file in self.files for name, value in file.config(shapes, self.metadata).items()}
        except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
            raise WeightsError(f"{self.path} does not tell its configuration: {error!r}") from error

    def record(self) -> dict[str, Any]:
        """What a fine-tune says of itself: latent space, backbone, step, recipe. Empty where nothing is recorded."""
        record = self._own_record() if RECORD in self.metadata else self._checkpoints_record()
        recipe = record.get("recipe")
        told = {key: recipe.get(key) for key in ("latent_space", "backbone")} if isinstance(recipe, dict) else {}
        return {**told, **record}

    def _own_record(self) -> dict[str, Any]:
        """What the files' own metadata says: it stays with them wherever they are copied."""
        try:
            record = json.loads(self.metadata[RECORD])
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise WeightsError(f"{self.path}: its metadata's {RECORD!r} is not a JSON object")
        return record

    def _checkpoints_record(self) -> dict[str, Any]:
        """What lies beside the folder, where its files say nothing."""
        path = self.path.parent / RECORD_FILE
        if not (self.path.is_dir() and path.is_file()):
            return {}
        checkpoint = read_json(path)
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("recipe"), dict):
            raise WeightsError(f"{path} is torn: it holds no recipe")
        return {key: value for key, value in checkpoint.items() if key != "files"}


def find_models(path: Path) -> list[StoredModel]:
    """Every model at a path: a safetensors file, a folder with one model, or a folder of such folders and files.

    Raises:
        WeightsError: there is none, or one is torn.
    """
    if path.is_file():
        return [read_model(path)]
    if not path.is_dir():
        raise WeightsError(f"{path} is neither a file nor a folder")
    inner = [path, *sorted(inner for inner in path.iterdir() if inner.is_dir())]
    folders = [folder for folder in inner if (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))]
    files = [] if path in folders else sorted([*path.glob("[!.]*.safetensors"), *path.glob("lora/[!.]*.safetensors")])
    files = [file for file in files if file.name != OPTIMIZER]
    found = [read_model(place) for place in folders + files]
    if not found:
        raise WeightsError(f"{path} holds no safetensors files, itself or one folder down")
    return found


def read_model(path: Path) -> StoredModel:
    """The model of one file, or of one folder with a config.

    Raises:
        WeightsError: it is no safetensors file, or it is torn.
    """
    tensors, metadata = read_sharded(path) if path.is_dir() else read_file(path)
    for family in all_families():
        tensors = _without_prefix(path, tensors, family.layout.prefix)
    found = StoredModel(path, tensors, metadata, "diffusers" if path.is_dir() else "unknown")
    if any("lora_" in name for name in tensors):
        return replace(found, layout="lora")
    for layout in (family.layout for family in all_families()):
        if files := tuple(file for file in layout.files if file.mark in tensors):
            return replace(found, layout=layout.name, files=files)
        if files := tuple(file for file in layout.files if _diffusers_mark(file) in tensors):
            return replace(found, layout="diffusers", files=files)
    return found


def _without_prefix(path: Path, tensors: Tensors, prefix: str) -> Tensors:
    """Remove the prefix that some tools write before every name."""
    named = {name.removeprefix(prefix): stored for name, stored in tensors.items()}
    if len(named) != len(tensors):
        raise WeightsError(f"{path} has the same tensor name both with and without the prefix {prefix!r}")
    return named


def _diffusers_mark(file: LayoutFile) -> str:
    """Return the diffusers name of the tensor that only this file has."""
    return next(rule.diffusers[0] for rule in file.rules(set()) if rule.original == file.mark)


def _rules(file: LayoutFile, found: StoredModel, wanted: set[str]) -> Iterator[Rule]:
    """The file's rules, once it is sure that exactly the names they take are there."""
    missing, unexpected = sorted(wanted - set(found.tensors)), sorted(set(found.tensors) - wanted)
    if missing or unexpected:
        raise WeightsError(f"{found.path} is no whole {file.name}: missing {missing}, unexpected {unexpected}")
    yield from file.rules(set(found.tensors))


def _apart(rule: Rule, stored: StoredTensor) -> list[tuple[str, StoredTensor]]:
    if rule.swapped:
        stored = concatenate(reversed(stored.split(2)))
    parts = stored.split(len(rule.diffusers)) if len(rule.diffusers) > 1 else [stored]
    return list(zip(rule.diffusers, parts, strict=True))


def _together(rule: Rule, tensors: Tensors) -> StoredTensor:
    stored = concatenate(tensors[name] for name in rule.diffusers)
    return concatenate(reversed(stored.split(2))) if rule.swapped else stored
