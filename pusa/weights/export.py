"""Write a fine-tune for use elsewhere: `pusa weights export CHECKPOINT FOLDER --to diffusers|genmo|lora|peft`.

Every file says in its metadata what it was made from and how.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pusa.backbones import DEFAULT_BACKBONE, all_families
from pusa.backbones.base import find_backbone
from pusa.errors import WeightsError
from pusa.manifest.models import ModelSpec
from pusa.system.files import scratch
from pusa.system.text import join_names
from pusa.weights.adapters import LORA_FILE, PEFT_FILE, find_adapter, resolve_last
from pusa.weights.convert import output_folder, write_models
from pusa.weights.load import DTYPES, load_part
from pusa.weights.lora import copy_lora
from pusa.weights.resolve import locate_part
from pusa.weights.source import PartFiles
from pusa.weights.stored import RECORD, StoredModel, find_models, read_model
from pusa.weights.write import config_of, write_transformer

EXPORTED = "exported"  # the key, in what a file records, of the layout that it was exported to
_LORAS = (LORA_FILE, PEFT_FILE)
_WHOLE, _LORA = {(False, False), (True, True)}, {(True, False)}  # (from a LoRA, merged into weights)
POSSIBLE = {
    "diffusers": _WHOLE,
    **{family.layout.name: _WHOLE for family in all_families()},
    "lora": _LORA,
    "peft": _LORA,
}
PLACES = {
    "diffusers": ("transformer",),
    **{
        family.layout.name: tuple(file.name for part in family.transformers for file in family.layout.files_of(part))
        for family in all_families()
    },
    "lora": _LORAS,
    "peft": _LORAS,
}


def export(checkpoint: Path, folder: Path, to: str, base: str | None = None) -> list[Path]:
    """Write the result of a fine-tune into `folder`, in place of an earlier export only.

    Args:
        checkpoint: a checkpoint of `pusa finetune`, its `last` too, a transformer's folder or file, or a LoRA.
        folder: a transformer becomes `transformer/` in it, or `dit.safetensors`; a LoRA its files.
        to: "diffusers" or "genmo", a transformer; "lora" or "peft", a LoRA alone as diffusers or PEFT keep it.
        base: weights to merge a LoRA into, which the result has the dtype of: what `weights` or `checkpoint` of a
            manifest may name.

    Returns:
        The files that the result consists of.

    Raises:
        WeightsError: that cannot be made of this checkpoint, it does not fit the base, or there is something else.
        StageError: another process is writing there.
    """
    checkpoint = resolve_last(checkpoint)  # `last` may move on
    adapter = find_adapter(checkpoint)
    _require_possible(checkpoint, adapter, to, base)
    with output_folder(folder):
        _require_free([folder / name for name in PLACES[to]])
        if adapter is None:
            return _write_whole(_transformer(checkpoint), folder, to)
        return _write_lora(adapter, folder, to) if base is None else _write_merged(adapter, base, folder, to)


def _write_whole(model: StoredModel, folder: Path, to: str) -> list[Path]:
    _require_apart(folder, [model.path])
    record = json.dumps({**model.record(), EXPORTED: to}, sort_keys=True)
    return write_models([replace(model, metadata={**model.metadata, RECORD: record})], folder, to)


def _write_lora(adapter: Path, folder: Path, to: str) -> list[Path]:
    _require_apart(folder, [adapter])
    return copy_lora(adapter, folder, to, {**read_model(adapter).record(), EXPORTED: to})


def _write_merged(adapter: Path, base: str, folder: Path, to: str) -> list[Path]:
    source = replace(locate_part(ModelSpec(weights=base, checkpoint=base), "transformer"), adapter=adapter)
    _require_apart(folder, [adapter, *source.paths])
    with _merged(source, folder, {**_lineage(read_model(adapter), source), EXPORTED: to}) as model:
        return write_models([model], folder, to)


def _require_possible(checkpoint: Path, adapter: Path | None, to: str, base: str | None) -> None:
    if (adapter is not None, base is not None) not in POSSIBLE[to]:
        raise WeightsError(
            f"{f'{adapter} is a LoRA' if adapter else f'{checkpoint} holds no LoRA'}; asked for is --to {to} "
            f"{f'with --base {base}' if base else 'alone'}. A LoRA is written --to lora or peft alone, or merged --to "
            "diffusers or genmo into the weights that --base names; anything else --to diffusers or genmo alone"
        )


def _require_free(places: Iterable[Path]) -> None:
    """Nothing is replaced but an earlier export."""
    for place in filter(Path.exists, places):
        there = sorted(place.glob("[!.]*")) if place.is_dir() else [place]
        weights = [path for path in there if path.suffix == ".safetensors"]
        if there and not (weights and all(EXPORTED in read_model(path).record() for path in weights)):
            raise WeightsError(
                f"{place} is there already, and is no earlier export: it is made of "
                f"{join_names([path.name for path in there])}; name another folder, or take it away"
            )


def _require_apart(folder: Path, inputs: Iterable[Path]) -> None:
    """What is exported must stay what it is."""
    for path in inputs:
        if folder.resolve() in (path.resolve(), path.parent.resolve()):
            raise WeightsError(f"{folder} holds {path}, which is exported from; name another folder to write into")


def _transformer(checkpoint: Path) -> StoredModel:
    found = [model for model in find_models(checkpoint) if model.part == "transformer"]
    if len(found) != 1:
        raise WeightsError(f"{checkpoint} holds {len(found)} transformers; wanted is one")
    return found[0]


@contextmanager
def _merged(source: PartFiles, folder: Path, record: Mapping[str, Any]) -> Iterator[StoredModel]:
    """The transformer that a LoRA makes of its base, in the base's dtype, on disk for as long as it is needed."""
    backbone = find_backbone(record.get("backbone") or DEFAULT_BACKBONE)
    transformer = load_part(backbone, source, _dtype(source))
    with scratch(folder / "merged") as partial:
        write_transformer(partial, transformer.state_dict(), config_of(transformer), record)
        yield read_model(partial)


def _lineage(adapter: StoredModel, source: PartFiles) -> dict[str, Any]:
    """The LoRA's record, in the latent space that its base may be the one to say; and, apart, the base's own record."""
    told: dict[str, Any] = {key: value for key, value in source.record().items() if key in ("latent_space", "backbone")}
    return {**adapter.record(), **told, "base_record": source.base.record() or None}


def _dtype(source: PartFiles) -> torch.dtype:
    """That of the weights, and fp32 where they have several."""
    there = {stored.dtype for path in source.paths for stored in read_model(path).tensors.values()}
    return DTYPES.get(there.pop(), torch.float32) if len(there) == 1 else torch.float32
