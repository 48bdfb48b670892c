"""Write a fine-tune for use elsewhere: `pusa weights export CHECKPOINT FOLDER --to diffusers|genmo|lora|...`.

Every file has a record in its metadata: what it was made from and how.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from pusa.backbones import all_families, all_layouts, all_transformers, find_family
from pusa.backbones.base import Backbone, find_backbone
from pusa.backbones.family import Family
from pusa.errors import WeightsError
from pusa.manifest.models import ModelSpec
from pusa.system.files import scratch
from pusa.system.text import join_names
from pusa.weights.adapters import LORA_FILES, find_adapter, read_lora, resolve_last
from pusa.weights.card import Card, find_sheet, write_card
from pusa.weights.convert import output_folder, require_layout, write_models
from pusa.weights.load import DTYPES, load_part
from pusa.weights.lora import copy_lora
from pusa.weights.lora_names import find_spelling
from pusa.weights.resolve import locate_part
from pusa.weights.source import Adapter, PartFiles
from pusa.weights.stored import RECORD, StoredModel, find_models, read_model
from pusa.weights.write import config_of, write_transformer

EXPORTED = "exported"  # the key of the layout in the record of an exported file
# Pairs of (the checkpoint is a LoRA, a base to merge it into is given).
_WHOLE, _LORA = {(False, False), (True, True)}, {(True, False)}
TRANSFORMERS = all_transformers()
# Where one of several transformers lies, in diffusers' layout and in the original ones.
_EXPERT_FOLDERS = dict.fromkeys(
    name
    for family in all_families()
    for part in family.experts.values()
    for name in (part, *(str(PurePosixPath(file.name).parent) for file in family.layout.files_of(part)))
)
ALLOWED_INPUTS = {
    "diffusers": _WHOLE,
    **{family.layout.name: _WHOLE for family in all_families()},
    **dict.fromkeys(LORA_FILES, _LORA),
}
OUTPUT_NAMES = {
    "diffusers": TRANSFORMERS,
    **{
        layout.name: tuple(
            file.name
            for other in all_layouts()
            for file in other.files
            if other.name == layout.name and file.part in TRANSFORMERS
        )
        for layout in all_layouts()
    },
    **dict.fromkeys(LORA_FILES, tuple(LORA_FILES.values())),
}


def export(
    checkpoint: Path,
    folder: Path,
    to: str,
    base: str | None = None,
    strength: float | None = None,
    licence: str | None = None,
) -> list[Path]:
    """Write the result of a fine-tune into `folder`. Only an earlier export is replaced.

    Args:
        checkpoint: a checkpoint of `pusa finetune` or its `last`, a transformer's folder or file, or a LoRA.
        folder: the output folder: for `transformer/`, for the original layout's files, or for a LoRA's files.
        to: "diffusers" or an original layout such as "genmo" for a transformer; for a LoRA alone "lora" (diffusers'
            layout), "peft", or "original-lora" (the names of the original layout, as ComfyUI reads them).
        base: weights to merge a LoRA into, as `weights` or `checkpoint` of a manifest name them. The result has their
            dtype.
        strength: of the LoRA that is merged; default 1.
        licence: the licence, in the user's words, for the card that exports in diffusers' layouts have.

    Returns:
        The files of the weights. Exports in a layout of diffusers have a card README.md beside them, perhaps with
        samples.jpg.

    Raises:
        WeightsError: the checkpoint has no such result, it does not fit the base, or the folder has other files.
        StageError: another process is writing into the folder.
    """
    checkpoint = resolve_last(checkpoint)  # `last` may change meanwhile
    adapter = find_adapter(checkpoint)
    _require_possible(checkpoint, adapter, to, base)
    if strength is not None and not (base and math.isfinite(strength)):
        raise WeightsError(
            f"strength is {strength:g}; a finite number can be given, together with a base to merge into"
        )
    with output_folder(folder):
        _require_free([folder / name for name in OUTPUT_NAMES[to]])
        if adapter is None:
            written = _write_whole(find_transformer(checkpoint), folder, to)
        elif base is None:
            written = _write_lora(adapter, folder, to)
        else:
            written = _write_merged(Adapter(adapter, 1.0 if strength is None else strength), base, folder, to)
        if to == "diffusers" or to in LORA_FILES:
            model = read_model(written[0] if to in LORA_FILES else written[-1].parent)
            sheet = find_sheet(checkpoint)
            write_card(folder, Card(model.record(), to, family_of(model).name, licence, sheet, base))
        return written


def _write_whole(model: StoredModel, folder: Path, to: str) -> list[Path]:
    require_apart(folder, [model.path])
    record = json.dumps({**model.record(), EXPORTED: to}, sort_keys=True)
    return write_models([replace(model, metadata={**model.metadata, RECORD: record})], folder, to)


def _write_lora(adapter: Path, folder: Path, to: str) -> list[Path]:
    require_apart(folder, [adapter])
    return copy_lora(adapter, folder, to, {**read_model(adapter).record(), EXPORTED: to})


def _write_merged(adapter: Adapter, base: str, folder: Path, to: str) -> list[Path]:
    family, expert = family_of(read_model(adapter.path)), adapter.record().get("expert")
    require_layout(to, family.layout, adapter.path)
    both = [name for name in _EXPERT_FOLDERS if (Path(base) / name).is_dir()]
    if not expert and len(both) > 1:
        raise WeightsError(
            f"{base} has {' and '.join(both)}, and {adapter.path} does not record which of them it is for; name the "
            f"folder of one, such as --base {Path(base) / both[0]}"
        )
    part = family.experts.get(str(expert), family.transformers[0])
    spec = ModelSpec(backbone=family.name, weights=base).with_checkpoint(part, base)
    source = replace(locate_part(spec, part), adapters=(adapter,))
    require_apart(folder, [adapter.path, *source.paths])
    lineage = {**merged_record(read_model(adapter.path), source), EXPORTED: to}
    if adapter.strength != 1:
        lineage["strength"] = adapter.strength
    with merged(source, folder, lineage, find_backbone(family.name)) as model:
        return write_models([model], folder, to)


def _require_possible(checkpoint: Path, adapter: Path | None, to: str, base: str | None) -> None:
    if (adapter is not None, base is not None) in ALLOWED_INPUTS[to]:
        return
    if adapter is None:
        wrong = f"--base {base} is for merging a LoRA: leave it out" if base else f"--to {to} is for a LoRA alone"
        raise WeightsError(f"{checkpoint} has no LoRA; {wrong}. A whole transformer is written with {_options(_WHOLE)}")
    if base is not None:
        raise WeightsError(
            f"{adapter} is a LoRA; --to {to} writes it alone: leave out --base {base}, or merge it with "
            f"{_options(_WHOLE)}"
        )
    whole = ", or pipeline" if isinstance(read_model(adapter).record().get("base"), Mapping) else ""
    raise WeightsError(
        f"{adapter} is a LoRA; --to {to} needs --base, the weights to merge it into. Without --base: "
        f"{_options(_LORA)}{whole}"
    )


def _options(inputs: set[tuple[bool, bool]]) -> str:
    return "--to " + ", ".join(layout for layout, allowed in ALLOWED_INPUTS.items() if allowed == inputs)


def _require_free(places: Iterable[Path]) -> None:
    """Check that each place is free or holds an earlier export."""
    for place in filter(Path.exists, places):
        files = sorted(place.glob("[!.]*")) if place.is_dir() else [place]
        weights = [path for path in files if path.suffix == ".safetensors"]
        if files and not (weights and all(EXPORTED in read_model(path).record() for path in weights)):
            raise WeightsError(
                f"{place} exists already and is not an earlier export: it is made of "
                f"{join_names([path.name for path in files])}; name another folder, or remove it"
            )


def require_apart(folder: Path, inputs: Iterable[Path]) -> None:
    """Check that the output folder does not hold an input."""
    for path in inputs:
        if folder.resolve() in (path.resolve(), path.parent.resolve()):
            raise WeightsError(f"{folder} holds {path}, an input of the export; name another folder to write into")


def family_of(model: StoredModel) -> Family:
    """Return the family of a transformer or a LoRA: the recorded one, else the first whose tensors have these names."""
    if name := model.record().get("backbone"):
        return find_family(name)
    if model.layout == "lora":
        layers = [name.removesuffix(".weight") for name in read_lora(model.path).additions]
        return find_spelling(layers).family or find_family()
    known = (family for family in all_families() if set(model.files) & set(family.layout.files))
    return next(known, find_family())


def find_transformer(checkpoint: Path) -> StoredModel:
    """Return the one transformer at a path.

    Raises:
        WeightsError: there is none, or several.
    """
    models = [model for model in find_models(checkpoint) if model.part in TRANSFORMERS]
    if len(models) != 1:
        raise WeightsError(f"{checkpoint} has {len(models)} transformers; expected one")
    return models[0]


@contextmanager
def merged(source: PartFiles, folder: Path, record: Mapping[str, Any], backbone: Backbone) -> Iterator[StoredModel]:
    """Merge a LoRA into its base, in the base's dtype, and write the result to a scratch folder for the time of use."""
    dtype = _dtype(source)
    transformer = load_part(backbone, source, dtype)
    with scratch(folder / "merged") as partial:
        write_transformer(partial, transformer.state_dict(), config_of(transformer), record, dtype)
        yield read_model(partial)


def merged_record(adapter: StoredModel, source: PartFiles) -> dict[str, Any]:
    """Return the LoRA's record with the base's latent space and backbone, and the base's record as `base_record`."""
    facts: dict[str, Any] = {
        key: value for key, value in source.record().items() if key in ("latent_space", "backbone")
    }
    return {**adapter.record(), **facts, "base_record": source.base.record() or None}


def _dtype(source: PartFiles) -> torch.dtype:
    """Return the dtype of the weights, or fp32 if they have several."""
    dtypes = {stored.dtype for path in source.paths for stored in read_model(path).tensors.values()}
    return DTYPES.get(dtypes.pop(), torch.float32) if len(dtypes) == 1 else torch.float32
