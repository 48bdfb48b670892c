"""Describe weights files for `pusa weights inspect`. Only headers are read, without torch."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from pusa.backbones import OTHER_MARKS, all_families, all_layouts
from pusa.backbones.family import Family
from pusa.system.files import read_object
from pusa.system.text import printable
from pusa.weights.adapters import describe_strength
from pusa.weights.lora_names import describe_names
from pusa.weights.stored import LORA_DELTAS, RECORD, StoredModel, find_models

LONGEST = 4000  # characters of one fact


def describe(path: Path) -> list[dict[str, Any]]:
    """Return facts of every model at a path: family, layout, dtypes, parameters, kind, latent space, lineage.

    Raises:
        WeightsError: there is none, or one is incomplete.
    """
    return [_facts(model, path) for model in find_models(path)]


def _facts(model: StoredModel, root: Path) -> dict[str, Any]:
    sizes = Counter[str]()
    for stored in model.tensors.values():
        sizes[stored.dtype] += prod(stored.shape)
    record = model.record()
    return {
        "path": str(model.path),
        "family": _family(model, record, sizes.total()),
        "size": _size(model, sizes.total()),
        "expert": _expert(model, record),
        "part": model.part or (model.path.name if model.path != root else None),
        "layout": model.layout,
        "kind": _kind(model),
        "names": describe_names(model.tensors)[1] if model.layout == "lora" else None,
        "strength": describe_strength(model) if model.layout == "lora" else None,
        "dtypes": dict(sizes),
        "tensors": len(model.tensors),
        "parameters": sizes.total(),
        "bytes": sum(stored.nbytes for stored in model.tensors.values()),
        "latent_space": record.get("latent_space"),
        "lineage": _lineage(model, record),
    }


def _family(model: StoredModel, record: dict[str, Any], parameters: int) -> str:
    """Return the family of a model; of families with equal networks the common name, unless something tells them apart.

    That is the record, the name of an expert's file or folder, a VAE of its own, or the number of parameters.
    """
    if names := [family.name for family in _families(model, parameters)]:
        recorded = record.get("backbone")
        return recorded if recorded in names else names[0] if len(names) == 1 else _layout_name(model)
    if model.layout == "lora" and isinstance(recorded := record.get("backbone"), str):
        return recorded
    if family := _marked(model, OTHER_MARKS):
        return family
    if model.layout == "lora" and (family := describe_names(model.tensors)[0]) != "unknown":
        return family
    if family := _marked(model, {name: mark for known in all_families() for name, mark in known.marks.items()}):
        return family
    config = read_object(model.path / "config.json") if model.path.is_dir() else {}
    return str(record.get("backbone") or config.get("_class_name", "unknown"))


def _marked(model: StoredModel, marks: Mapping[str, str]) -> str:
    return next((name for name, mark in marks.items() if any(re.search(mark, tensor) for tensor in model.tensors)), "")


def _families(model: StoredModel, parameters: int) -> list[Family]:
    """Return the families that a model can be of; several may have layouts of one name."""
    if not model.files:
        return []
    file = model.files[0]
    related = [family for family in all_families() if family.layout.name == _layout_name(model)]
    if file.named:
        return [family for family in related if file in family.layout.files]
    equal = [family for family in related if any(other.mark == file.mark for other in family.layout.files)]
    return [family for family in equal if parameters in family.sizes.values()] or equal


def _layout_name(model: StoredModel) -> str:
    return next(layout.name for layout in all_layouts() if model.files[0] in layout.files)


def _size(model: StoredModel, parameters: int) -> str | None:
    """Return the name of a published transformer's size, e.g. "14B"."""
    families = _families(model, parameters)
    return next((size for f in families for size, count in f.sizes.items() if count == parameters), None)


def _expert(model: StoredModel, record: dict[str, Any]) -> str | None:
    """Return which expert a transformer is, by its record or the name of its file or folder."""
    own = [family for family in all_families() if model.files and model.files[0] in family.layout.files]
    names = [name for family in own for name, part in family.experts.items() if part == model.part]
    recorded = record.get("expert")
    return recorded if isinstance(recorded, str) else next(iter(names), None)


def _kind(model: StoredModel) -> str:
    """Return "full" for full weights, or the ranks of a LoRA and how many whole deltas it has."""
    if model.layout != "lora":
        return "full"
    ranks = [s.shape[0] for name, s in model.tensors.items() if s.shape and re.search(r"lora_(A|down)", name)]
    span = "..".join(map(str, sorted({min(ranks), max(ranks)}))) if ranks else ""
    deltas = Counter(end for end in LORA_DELTAS for name in model.tensors if name.endswith(end))
    parts = [f"rank {span} ({len(ranks)} layers)"] if ranks else []
    parts += [f"{count} whole deltas named *{end}" for end, count in deltas.items()]
    return f"LoRA of {' and '.join(parts)}"


def _lineage(model: StoredModel, record: dict[str, Any]) -> dict[str, Any]:
    """Return where a model comes from: the fine-tune's record, else the other metadata of its files."""
    own = {"format", RECORD, *(name for family in all_families() for name in family.layout.in_metadata)}
    lineage = {key: value for key, value in record.items() if key != "latent_space" and value is not None}
    return lineage or {key: value for key, value in model.metadata.items() if key not in own}


def format_facts(facts: list[dict[str, Any]]) -> str:
    """Return the facts as text, a paragraph for each model."""
    return "\n".join(_paragraph(model) for model in facts)


def _paragraph(facts: dict[str, Any]) -> str:
    dtypes = ", ".join(f"{name} ({share / max(1, facts['parameters']):.0%})" for name, share in facts["dtypes"].items())
    lines = {
        "family": ", ".join(filter(None, (facts["family"], facts["size"], facts["part"]))),
        "expert": facts["expert"],
        "layout": facts["layout"],
        "kind": facts["kind"],
        "names": facts["names"],
        "strength": facts["strength"],
        "dtype": dtypes,
        "parameters": f"{facts['parameters']:,} in {facts['tensors']} tensors, {facts['bytes'] / 1e9:.3f} GB",
        "latent space": facts["latent_space"] or "not recorded",
        "lineage": json.dumps(facts["lineage"]) if facts["lineage"] else "not recorded",
    }
    shown = (f"  {name:<13}{printable(value, LONGEST)}" for name, value in lines.items() if value)
    return "\n".join([printable(facts["path"]), *shown])
