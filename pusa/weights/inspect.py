"""Say what a weights file is: `pusa weights inspect`. Only headers are read. No torch here."""

import json
import re
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from pusa.backbones import all_families
from pusa.system.files import read_json
from pusa.weights.adapters import describe_strength
from pusa.weights.stored import RECORD, StoredModel, find_models


def describe(path: Path) -> list[dict[str, Any]]:
    """Facts of every model at a path: family, layout, dtypes, parameters, kind, latent space, lineage.

    Raises:
        WeightsError: there is none, or one is torn.
    """
    return [_facts(model, path) for model in find_models(path)]


def _facts(model: StoredModel, root: Path) -> dict[str, Any]:
    sizes = Counter[str]()
    for stored in model.tensors.values():
        sizes[stored.dtype] += prod(stored.shape)
    record = model.record()
    return {
        "path": str(model.path),
        "family": _family(model, record),
        "part": model.part or (model.path.name if model.path != root else None),
        "layout": model.layout,
        "kind": _kind(model),
        "strength": describe_strength(model) if model.layout == "lora" else None,
        "dtypes": dict(sizes),
        "tensors": len(model.tensors),
        "parameters": sizes.total(),
        "bytes": sum(stored.nbytes for stored in model.tensors.values()),
        "latent_space": record.get("latent_space"),
        "lineage": _lineage(model, record),
    }


def _family(model: StoredModel, record: dict[str, Any]) -> str:
    for family, pattern in [mark for known in all_families() for mark in known.marks.items()]:
        if any(re.search(pattern, name) for name in model.tensors):
            return family
    config = read_json(model.path / "config.json") if model.path.is_dir() else None
    return str(record.get("backbone") or (config or {}).get("_class_name", "unknown"))


def _kind(model: StoredModel) -> str:
    """Full weights, or a LoRA with its rank."""
    if model.layout != "lora":
        return "full"
    ranks = {s.shape[0] for name, s in model.tensors.items() if s.shape and re.search(r"lora_(A|down)", name)}
    return f"LoRA of rank {', '.join(map(str, sorted(ranks)))}"


def _lineage(model: StoredModel, record: dict[str, Any]) -> dict[str, Any]:
    """Where it comes from, as far as it says: the fine-tune's record, else what its writer left in the metadata."""
    own = {"format", RECORD, *(name for family in all_families() for name in family.layout.in_metadata)}
    lineage = {key: value for key, value in record.items() if key != "latent_space" and value is not None}
    return lineage or {key: value for key, value in model.metadata.items() if key not in own}


def format_facts(facts: list[dict[str, Any]]) -> str:
    """The facts for people."""
    return "\n".join(_paragraph(one) for one in facts)


def _paragraph(one: dict[str, Any]) -> str:
    dtypes = ", ".join(f"{name} ({share / max(1, one['parameters']):.0%})" for name, share in one["dtypes"].items())
    lines = {
        "family": one["family"] + (f", {one['part']}" if one["part"] else ""),
        "layout": one["layout"],
        "kind": one["kind"],
        "strength": one["strength"],
        "dtype": dtypes,
        "parameters": f"{one['parameters']:,} in {one['tensors']} tensors, {one['bytes'] / 1e9:.3f} GB",
        "latent space": one["latent_space"] or "not recorded",
        "lineage": json.dumps(one["lineage"]) if one["lineage"] else "not recorded",
    }
    return "\n".join([one["path"], *(f"  {name:<13}{value}" for name, value in lines.items() if value)])
