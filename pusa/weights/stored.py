"""Read the models at a path with their layouts, recognised by tensor names and shapes, without torch."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pusa.backbones import all_families, all_layouts
from pusa.backbones.family import Layout, LayoutFile, Rule
from pusa.backbones.settings import read_small
from pusa.errors import WeightsError
from pusa.system.files import read_json, read_object
from pusa.system.text import join_names, preview, printable
from pusa.weights.tensors import (
    INDEX,
    StoredTensor,
    Tensors,
    concatenate,
    parse_unique,
    read_file,
    read_indexed,
    read_sharded,
    shards_named_in,
)

CONFIG = "config.json"
OPTIMIZER = "training.safetensors"  # lies beside the model in a checkpoint
RECORD = "pusa"  # the key of a fine-tune's record in a file's metadata
LORA_DELTAS = (".diff", ".diff_b", ".diff_m")  # how the names end under which a LoRA has whole deltas
RECORD_FILE = "checkpoint.json"  # the record of a checkpoint, where its files have none
_SCALE = re.compile(r"(^|\.)(scaled_fp8|scale_weight|scale_input|weight_scale|input_scale)$")  # of quantised weights


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
        """Return which part of a model this is, or None if unknown.

        Which of two equal transformers it is shows only in its record, or in the name of its file or folder.
        """
        return self.files[0].part if self.files else None

    def may_be(self, part: str) -> bool:
        """Return whether the tensors are those of a part: of two equal transformers, either may be the other."""
        return bool(self.files) and any(
            file.part == part for layout in all_layouts() for file in layout.files if file.mark == self.files[0].mark
        )

    def require_usable(self) -> None:
        """Check that the weights are of a kind that Pusa can use.

        Raises:
            WeightsError: they are quantised, or of a model with other inputs.
        """
        if any(stored.dtype.startswith("F8_") or _SCALE.search(name) for name, stored in self.tensors.items()):
            raise WeightsError(
                f"{self.path} is quantised to 8 bits, which Pusa does not read; use the file of the same model whose "
                "name has bf16 or fp16"
            )
        for layout in all_layouts():
            if not set(self.files) & set(layout.files):
                continue
            for pattern, reason in layout.refused.items():
                if found := next((name for name in self.tensors if re.search(pattern, name)), None):
                    raise WeightsError(f"{self.path} has the tensor {printable(found)}: {reason}")

    def in_diffusers_names(self) -> Tensors:
        """Return the tensors by diffusers' names.

        Raises:
            WeightsError: a tensor is missing or unknown, the tensors are those of several files of a layout, or they
                cannot be used.
        """
        self.require_usable()
        if self.layout in ("diffusers", "lora", "unknown"):
            return self._used()
        file, *others = self.files
        if others:
            both = " and ".join(known.name for known in self.files)
            raise WeightsError(f"{self.path} has tensors of {both}; expected those of one file")
        own = self._used()
        rules = _rules(file, replace(self, tensors=own), {rule.original for rule in file.rules(set(own))})
        return dict(pair for rule in rules for pair in to_diffusers(rule, own[rule.original], _inputs(rule, own)))

    def in_original_names(self, file: LayoutFile) -> Tensors:
        """Return the tensors that `file` holds, by the names of the original layout.

        Raises:
            WeightsError: a tensor is missing or unknown, or the tensors cannot be used.
        """
        self.require_usable()
        if self.layout not in ("diffusers", "lora", "unknown"):
            return self._used()
        others = tuple(other.prefix for other in self.files if other is not file)
        own = {name: stored for name, stored in self._used().items() if not name.startswith(others)}
        expected = {name for rule in file.rules(set(own)) for name in rule.diffusers}
        rules = _rules(file, replace(self, tensors=own), expected)
        return {rule.original: to_original(rule, own) for rule in rules}

    def _used(self) -> Tensors:
        """Return the tensors without the spare ones that some tools write; one may stand for the tensor it equals."""
        tensors = dict(self.tensors)
        for name, same in (pair for file in self.files for pair in file.spare):
            if (stored := tensors.pop(name, None)) and same:
                tensors.setdefault(same, stored)
        return tensors

    def config(self) -> dict[str, Any]:
        """Return the model's configuration in diffusers' words: from its config.json, or from its tensors' shapes.

        Raises:
            WeightsError: it cannot be derived.
        """
        if self.layout == "diffusers" and self.path.is_dir() and (self.path / CONFIG).exists():
            return read_small(self.path / CONFIG)
        if not self.files:
            raise WeightsError(f"{self.path} has no {CONFIG}, and its tensors are not of a known family")
        shapes = {name: stored.shape for name, stored in self.in_diffusers_names().items()}
        stated = {**self.metadata, **self.original_config()}
        try:
            return {name: value for file in self.files for name, value in file.config(shapes, stated).items()}
        except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
            reason = printable(error) if type(error) is ValueError else preview(error)  # a sentence, or of Python
            raise WeightsError(
                f"the configuration cannot be derived from the tensors of {self.path}: {reason}"
            ) from error

    def original_config(self) -> dict[str, Any]:
        """Return the config.json that the authors keep beside a file in their layout; empty if there is none."""
        path = (self.path if self.path.is_dir() else self.path.parent) / CONFIG
        known = [file.original_class for file in self.files if file.original_class and self.layout != "diffusers"]
        config = read_small(path) if known and path.is_file() else {}
        return config if config.get("_class_name") in known else {}

    def record(self) -> dict[str, Any]:
        """Return the record of the fine-tune: latent space, backbone, step, recipe; empty if there is none."""
        record = self._own_record() if RECORD in self.metadata else self._checkpoints_record()
        recipe = record.get("recipe")
        facts = (
            {key: recipe.get(key) for key in ("latent_space", "backbone", "expert")} if isinstance(recipe, dict) else {}
        )
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


def read_settings(path: Path) -> dict[str, Any]:
    """Return the settings in a config.json in diffusers' words, also where it is the one of a model's authors.

    Raises:
        WeightsError: it cannot be read, or is incomplete.
    """
    values = read_small(path)
    for file in (file for layout in all_layouts() for file in layout.files):
        if file.from_original and values.get("_class_name") == file.original_class:
            try:
                return file.from_original(values)
            except (ArithmeticError, LookupError, TypeError, ValueError) as error:
                raise WeightsError(f"{path} is not a complete {file.original_class}: {preview(error)}") from error
    return values


def find_models(path: Path) -> list[StoredModel]:
    """Read every model at a path: a safetensors file or index, a folder with one model, or a folder of all these.

    Raises:
        WeightsError: there is none, or one is incomplete.
    """
    if path.is_file():
        return [read_model(path)]
    if not path.is_dir():
        raise WeightsError(f"{path} is neither a file nor a folder")
    places: list[Path] = []
    for folder in [path, *sorted(inner for inner in path.iterdir() if inner.is_dir())]:
        has_config = (folder / CONFIG).is_file()
        if has_config and not is_original(folder) and any(folder.glob("*.safetensors")):
            places.append(folder)
        elif has_config or folder == path or (folder.name == "lora" and path not in places):
            places += models_in(folder)
    models = [read_model(place) for place in places]
    if not models:
        raise WeightsError(
            f"{path} and the folders in it have no weights; expected a safetensors file, or a folder with config.json "
            "and safetensors files"
        )
    return models


def models_in(folder: Path) -> list[Path]:
    """Return the models that lie in a folder as single files, those in shards by their index."""
    indexes = sorted(folder.glob(f"[!.]*.safetensors{INDEX}"))
    shards = {folder / name for index in indexes for name in shards_named_in(index)}
    files = sorted({*folder.glob("[!.]*.safetensors")} - shards)
    return [*indexes, *(file for file in files if file.name != OPTIMIZER)]


def is_original(folder: Path) -> bool:
    """Return whether a folder's config.json is one that the authors of a family keep beside their files."""
    known = [file.original_class for layout in all_layouts() for file in layout.files if file.original_class]
    return read_object(folder / CONFIG).get("_class_name") in known


def read_model(path: Path) -> StoredModel:
    """Read the model of one file, of the shards of one index, or of one folder with a config.

    Raises:
        WeightsError: the file is not a safetensors file, or is incomplete.
    """
    if path.is_dir():
        tensors, metadata = read_sharded(path)
    else:
        tensors, metadata = read_indexed(path) if path.name.endswith(INDEX) else read_file(path)
    for file in (file for layout in all_layouts() for file in layout.files):
        tensors = _in_own_names(path, tensors, file)
    model = StoredModel(path, tensors, metadata, "diffusers" if path.is_dir() else "unknown")
    if any("lora_" in name or name.endswith(LORA_DELTAS) for name in tensors):
        return replace(model, layout="lora")
    found = [choice for layout in all_layouts() for choice in _choices(model, layout)]
    return max(found, key=_likelihood, default=model)


def _choices(model: StoredModel, layout: Layout) -> Iterator[StoredModel]:
    """Yield the model as each part of a layout that its tensors can be."""
    # Where both layouts have the same names, only a folder is in diffusers': it has a configuration.
    is_folder = model.path.is_dir()
    originals = [
        file
        for file in layout.files
        if file.mark in model.tensors and not (is_folder and file.mark == file.diffusers_mark)
    ]
    renamed = [file for file in layout.files if file.diffusers_mark in model.tensors and file not in originals]
    for name, files in ((layout.name, originals), ("diffusers", renamed)):
        for part in dict.fromkeys(file.part for file in files):
            yield replace(model, layout=name, files=tuple(file for file in files if file.part == part))


def _likelihood(model: StoredModel) -> int:
    """Return how well a model's record and place fit the part that it may be; of equals the first is taken."""
    file = model.files[0]
    if not file.named:
        return 1
    record = model.record()
    if isinstance(expert := record.get("expert"), str):
        parts = [family.experts.get(expert) for family in all_families() if family.name == record.get("backbone")]
        return 2 if file.part in parts else 0
    path = model.path
    names = [path.name, path.parent.name] if path.name.startswith(file.stem) else [path.name]
    layout = next(layout for layout in all_layouts() if file in layout.files)
    equals = [other for other in layout.files if other.mark == file.mark]
    is_one_of_all = path.name == file.part and all((path.parent / other.part).is_dir() for other in equals)
    return 2 if is_one_of_all or any(re.search(file.named, name) for name in names) else 0


def _in_own_names(path: Path, tensors: Tensors, file: LayoutFile) -> Tensors:
    """Return the tensors of a file without the prefix and the spelling of the tool that wrote it.

    Raises:
        WeightsError: a tensor has both names.
    """
    marks = {file.mark, file.spell(file.mark), file.diffusers_mark}
    for prefix in file.prefixes:
        if any(start + mark in tensors for mark in marks for start in ("", prefix)):
            named = {name.removeprefix(prefix): stored for name, stored in tensors.items()}
            if len(named) != len(tensors):
                raise WeightsError(f"{path} has the same tensor name both with and without the prefix {prefix!r}")
            tensors = named
    if not file.spelling or not {file.mark, file.spell(file.mark)} & tensors.keys():
        return tensors
    named = {}
    for name, stored in tensors.items():
        if (own := file.unspell(name)) in named or (own != name and own in tensors):
            raise WeightsError(f"{path} has {printable(own)} twice, in two spellings; remove one of them")
        is_matrix = file.matrices and re.fullmatch(file.matrices, own) and set(stored.shape[2:]) == {1}
        named[own] = replace(stored, shape=stored.shape[:2]) if is_matrix else stored
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


def _inputs(rule: Rule, tensors: Tensors) -> int | None:
    """Return the number of inputs of the layer that has an original tensor, a weight or a bias; None if it has none."""
    weight = tensors.get(f"{rule.original.rpartition('.')[0]}.weight")
    return weight.shape[1] if weight and len(weight.shape) > 1 else None


def to_diffusers(rule: Rule, stored: StoredTensor, inputs: int | None = None) -> list[tuple[str, StoredTensor]]:
    """Return diffusers' name and content of each tensor that an original one consists of.

    Args:
        rule: says which.
        stored: the original tensor, or the B of a LoRA for it.
        inputs: of the layer, where they show how it is split.

    Raises:
        WeightsError: it cannot be split.
    """
    if rule.swapped:
        stored = _swap_halves(rule, stored)
    if len(rule.diffusers) == 1:
        return [(rule.diffusers[0], stored)]
    try:
        rows = rule.rows_of(stored.shape[0] if stored.shape else 0, inputs)
    except ValueError as error:
        raise WeightsError(f"{stored.ranges[0].path}: {rule.original}: {error}") from error
    return list(zip(rule.diffusers, stored.split(rows), strict=True))


def to_original(rule: Rule, tensors: Tensors) -> StoredTensor:
    """Return the original tensor that some of diffusers' are parts of."""
    stored = concatenate(tensors[name] for name in rule.diffusers)
    return _swap_halves(rule, stored) if rule.swapped else stored


def _swap_halves(rule: Rule, stored: StoredTensor) -> StoredTensor:
    rows = stored.shape[0] if stored.shape else 0
    if rows % 2 or not rows:
        raise WeightsError(f"{stored.ranges[0].path}: {rule.original}: {rows} rows cannot be split into 2 equal parts")
    return concatenate(reversed(stored.split([rows // 2] * 2)))
