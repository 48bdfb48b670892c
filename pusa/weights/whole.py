"""Write a whole pipeline: a fine-tuned transformer, and beside it all other parts of its base.

`pusa weights export CHECKPOINT FOLDER --to pipeline`. A kill leaves a folder without its index, which nobody loads;
the same command completes it.
"""

import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import transformers
from pydantic import ValidationError

from pusa.backbones import find_family
from pusa.backbones.base import Backbone, find_backbone
from pusa.backbones.settings import read_small
from pusa.errors import WeightsError
from pusa.manifest.models import ModelSpec
from pusa.system.files import digest, publish, read_object, remove, scratch, sha256_file, write_json
from pusa.system.strict import list_problems
from pusa.weights.adapters import find_adapter, resolve_last
from pusa.weights.card import Card, find_sheet, write_card
from pusa.weights.convert import output_folder, write_models
from pusa.weights.export import (
    EXPORTED,
    TRANSFORMERS,
    family_of,
    find_transformer,
    merged,
    merged_record,
    require_apart,
)
from pusa.weights.load import part_settings
from pusa.weights.resolve import MODEL_INDEX, boundary, latent_space, locate_part
from pusa.weights.source import Adapter, PartFiles
from pusa.weights.stored import CONFIG, RECORD, StoredModel, read_model
from pusa.weights.tensors import index_of

SCHEDULER, PIPELINE = "scheduler", "pipeline"
COPIED = (".safetensors", ".json", ".model", ".txt")
VARIANT = ".bf16"  # in the names of the variant that is read where a folder has it
LONGEST = 1 << 26  # bytes of a JSON file: a vocabulary or an index
CONTENT = ".pusa-export.json"  # part -> hashes of what this command wrote, or is about to write, into its folder


def export_pipeline(
    checkpoint: Path, folder: Path, base: str | None = None, strength: float = 1.0, licence: str | None = None
) -> list[Path]:
    """Write a folder that `PusaPipeline.from_pretrained` and a manifest's `weights` read: all parts of a model.

    Args:
        checkpoint: a checkpoint of `pusa finetune` or its `last`, a transformer's folder or file, or a LoRA, which is
            merged into the base's transformer.
        folder: the output folder. Only an earlier export is replaced.
        base: the model that the other parts are of, as `weights` of a manifest names it; default: the recorded one.
        strength: of a LoRA.
        licence: for the card.

    Returns:
        The folders and files of the result; the index is the last.

    Raises:
        WeightsError: the base is not recorded or lacks a part, something does not fit, or the folder has other files.
        StageError: another process is writing into the folder.
        OSError: a file cannot be written.
    """
    checkpoint = resolve_last(checkpoint)  # `last` may change meanwhile
    adapter = find_adapter(checkpoint)
    if not math.isfinite(strength) or (strength != 1 and adapter is None):
        raise WeightsError(f"strength is {strength:g}; a finite number can be given, for a LoRA")
    tuned = read_model(adapter) if adapter else find_transformer(checkpoint)
    spec, part = _model_of(tuned, base)
    backbone = find_backbone(spec.backbone)
    sources = {name: locate_part(spec, name) for name in backbone.family.parts if adapter or name != part}
    if adapter:
        own = sources[part]
        sources[part] = replace(own, adapters=(*own.adapters, Adapter(adapter, strength)))
        sources[part].additions()
    else:
        sources[part] = PartFiles(part, (tuned.path,))
    space = latent_space(spec, sources[part])
    for name in sorted({*sources} & {*backbone.settings}):
        part_settings(backbone, sources[name])
    for name in backbone.family.tokenizers:
        backbone.load_tokenizer(name, sources[name].paths[0])
    require_apart(folder, [checkpoint, *(path for source in sources.values() for path in source.paths)])
    require_apart(folder, [path.parent for source in sources.values() for path in source.paths])
    with output_folder(folder):
        content = Content(folder)
        content.require_own({*sources, SCHEDULER})
        (folder / MODEL_INDEX).unlink(missing_ok=True)  # from here on the folder is incomplete
        for name, source in sources.items():
            is_tuned = name == part
            with content.writing(name) as partial:
                _write_part(source, partial, backbone, tuned if is_tuned else None, space)
        content.copy_scheduler(sources)
        index = _index(folder, backbone)
        if backbone.family.experts:
            index["boundary_ratio"] = boundary(spec)
        record = {**tuned.record(), **({"strength": strength} if strength != 1 else {})}
        card = Card(record, PIPELINE, spec.backbone, licence, find_sheet(checkpoint), spec.weights)
        written = write_card(folder, card)
        write_json(folder / MODEL_INDEX, index)
    places = [folder / name for name in (*sources, SCHEDULER) if (folder / name).is_dir()]
    return [*places, *written, folder / MODEL_INDEX]


class Content:
    """The parts in an output folder, and what an earlier export wrote there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[str, list[str]] = {
            name: hashes for name, hashes in read_object(folder / CONTENT).items() if isinstance(hashes, list)
        }

    def require_own(self, names: set[str]) -> None:
        """Check that each part is missing, or as an earlier export wrote it.

        Raises:
            WeightsError: it is not; nothing was changed.
        """
        for name in sorted(names):
            place = self.folder / name
            if place.exists() and _hash_of(place) not in self._known.get(name, ()):
                raise WeightsError(
                    f"{place} exists already and is not as an earlier export wrote it; name another folder, or remove "
                    "it"
                )

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Yield a folder to write a part into, which then takes the place of the one before.

        What it holds is noted first, so that it is known after a kill.
        """
        place = self.folder / name
        with scratch(place) as partial:
            partial.mkdir()
            yield partial
            new = _hash_of(partial)
            if place.exists() and _hash_of(place) == new:
                return
            self._note(name, [*self._known.get(name, ())[-1:], new])
            remove(place)
            publish(partial, place)
            self._note(name, [new])

    def copy_scheduler(self, sources: Mapping[str, PartFiles]) -> None:
        """Copy the configuration of the base's scheduler, which diffusers' own pipelines need, if there is one."""
        folders = [source.folder for name, source in sources.items() if name not in TRANSFORMERS and source.folder]
        config = next(
            (file for f in folders if (file := f.parent / SCHEDULER / "scheduler_config.json").is_file()), None
        )
        if config is None:
            remove(self.folder / SCHEDULER)
            return
        with self.writing(SCHEDULER) as partial:
            shutil.copyfile(config, partial / config.name)

    def _note(self, name: str, hashes: list[str]) -> None:
        self._known[name] = hashes
        write_json(self.folder / CONTENT, self._known)


def _hash_of(folder: Path) -> str:
    """Return a hash of the names and contents of a folder's files; hidden ones do not count."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")
    return digest([(str(path.relative_to(folder)), sha256_file(path)) for path in files])[:16]


def _model_of(tuned: StoredModel, base: str | None) -> tuple[ModelSpec, str]:
    """Return the model that a fine-tune is of, and which part of it the fine-tune is.

    Raises:
        WeightsError: its base is neither given nor recorded, or its expert is not known.
    """
    record, family = tuned.record(), family_of(tuned)
    if base is not None:
        values: Any = {"backbone": family.name, "weights": base}
    elif isinstance(record.get("base"), Mapping):
        values = record["base"]
    else:
        raise WeightsError(f"{tuned.path} does not record its base; name the base with --base")
    try:
        spec = ModelSpec.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(list_problems(error, ModelSpec))
        raise WeightsError(f"the base of {tuned.path} cannot be used: {problems}; name it with --base") from error
    family, expert = find_family(spec.backbone), record.get("expert")
    if family.experts and expert not in family.experts:
        raise WeightsError(
            f"{tuned.path} does not record which of the transformers it is, and {family.name} has "
            f"{' and '.join(family.experts)}"
        )
    return spec, family.experts[str(expert)] if family.experts else family.transformers[0]


def _write_part(source: PartFiles, place: Path, backbone: Backbone, tuned: StoredModel | None, space: str) -> None:
    """Write a part in diffusers' layout into an empty folder.

    Args:
        source: its files; LoRAs are merged.
        place: the folder.
        backbone: what the part belongs to.
        tuned: the fine-tune, whose record the part gets; None for a part of the base.
        space: the latent space, which a fine-tune may lack in its record.

    Raises:
        WeightsError: the part has a layout that cannot be converted.
    """
    if source.adapters:
        record = {**(merged_record(tuned, source) if tuned else source.record()), EXPORTED: PIPELINE}
        if tuned:
            record["latent_space"] = space
            if (strength := source.adapters[-1].strength) != 1:
                record["strength"] = strength
        with merged(source, place, record, backbone) as model:
            _write_models([model], place)
    elif tuned is not None:
        record = {**tuned.record(), "latent_space": space, EXPORTED: PIPELINE}
        _write_models([replace(tuned, metadata={**tuned.metadata, RECORD: json.dumps(record, sort_keys=True)})], place)
    elif source.folder and (source.part not in backbone.classes or read_model(source.folder).layout == "diffusers"):
        _copy(source, place)
    else:
        models = [read_model(path) for path in source.paths]
        if not all(model.files for model in models):
            raise WeightsError(f"{source} is not in diffusers' layout; `pusa weights convert` may convert it before")
        _write_models(models, place)


def _copy(source: PartFiles, place: Path) -> None:
    """Copy the files of a part in diffusers' layout: weights, their index, settings and vocabularies, and no code.

    The files of a variant of the weights lose its name, which `from_pretrained` would have to be given.

    Raises:
        WeightsError: a file of settings is not a JSON object, as a link to something else may not be.
    """
    assert source.folder
    used = {file.name for file in source.files() if file.suffix in COPIED}
    if index := index_of(source.folder):
        used.add(index.name)
    for name in sorted(used):
        target = place / name.replace(VARIANT, "")
        values = read_small(source.folder / name, LONGEST) if name.endswith(".json") else {}
        if isinstance(named := values.get("weight_map"), dict):
            write_json(target, {**values, "weight_map": {key: str(v).replace(VARIANT, "") for key, v in named.items()}})
        else:
            shutil.copyfile(source.folder / name, target)


def _write_models(models: list[StoredModel], place: Path) -> None:
    """Write models into the folder of their part, without a folder of the part's own name in it."""
    with scratch(place / "converted") as partial:
        partial.mkdir()
        write_models(models, partial, "diffusers")
        for file in partial.glob("*/[!.]*"):
            file.rename(place / file.name)


def _index(folder: Path, backbone: Backbone) -> dict[str, Any]:
    """Return the index of the parts in a folder, with classes that every reader of diffusers' layout has."""
    index: dict[str, Any] = {"_class_name": "PusaPipeline", "_diffusers_version": version("diffusers")}
    for part, cls in backbone.classes.items():
        if part in backbone.family.parts:
            name = read_object(folder / part / CONFIG).get("_class_name")
            plain = next((kind.__name__ for kind in cls.__mro__ if hasattr(transformers, kind.__name__)), cls.__name__)
            index[part] = ["diffusers", name] if name else ["transformers", plain]
    for part in backbone.family.tokenizers:
        stated = read_object(folder / part / "tokenizer_config.json").get("tokenizer_class")
        known = isinstance(stated, str) and re.fullmatch(r"\w+", stated) and hasattr(transformers, stated)
        index[part] = ["transformers", stated if known else "PreTrainedTokenizerFast"]
    name = read_object(folder / SCHEDULER / "scheduler_config.json").get("_class_name")
    return index | ({SCHEDULER: ["diffusers", name]} if name else {})
