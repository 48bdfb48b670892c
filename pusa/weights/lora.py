"""Write a LoRA without its base: in the layout of diffusers, of PEFT, or with the original names as ComfyUI does."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from pusa.errors import WeightsError
from pusa.manifest.training import Lora
from pusa.system.files import write_json
from pusa.system.text import join_names, preview
from pusa.weights.adapters import (
    LORA_FILE,
    LORA_FILES,
    PEFT_CONFIG,
    SETTINGS,
    LoraFile,
    LoraLayer,
    lora_files,
    read_lora,
)
from pusa.weights.lora_names import DIFFUSERS_PREFIX, FEW, ORIGINAL_PREFIX, PEFT_PREFIX, original_rules
from pusa.weights.stored import to_original
from pusa.weights.tensors import Content, write_file
from pusa.weights.write import Loaded, file_metadata, save_tensors


def effective_alpha(method: Lora) -> float:
    """Return alpha, the numerator of the scale alpha / rank; by default the rank."""
    return method.rank if method.alpha is None else method.alpha


def write_lora(folder: Path, tensors: Mapping[str, Tensor], method: Lora, record: Mapping[str, Any]) -> Path:
    """Write a trained LoRA in diffusers' layout, for `pipeline.load_lora_weights(folder)`.

    Args:
        folder: a scratch folder; created if it does not exist.
        tensors: the LoRA's parameters, by their names in the model in training (`...to_q.lora_A.default.weight`).
        method: its rank and alpha go into the metadata, where diffusers looks for them; without them diffusers would
            add B A without a scale.
        record: the fine-tune's record, kept in the metadata.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plain = {name.replace(".default.", "."): tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    layers = {name.rpartition(".lora_")[0] for name in plain}
    path = folder / LORA_FILE
    named = {DIFFUSERS_PREFIX + name: tensor for name, tensor in plain.items()}
    save_tensors(path, named, file_metadata(record) | _metadata(layers, method.rank, effective_alpha(method)))
    return path


def copy_lora(adapter: Path, folder: Path, to: str, record: Mapping[str, Any]) -> list[Path]:
    """Write a LoRA of any known naming into `folder`, in place of a LoRA of any of the three layouts there.

    Args:
        adapter: the LoRA's file.
        folder: after a kill it holds the old LoRA, none, or the new one.
        to: "lora", diffusers' layout, for `load_lora_weights(folder)`; "peft", for
            `PeftModel.from_pretrained(transformer, folder)`; or "original-lora", the names of the original layout
            behind `diffusion_model.` and each layer's alpha in a tensor, as ComfyUI and others read it.
        record: the record kept in the metadata.

    Returns:
        The files written.

    Raises:
        WeightsError: the layout has no place for what the LoRA has.
    """
    lora = read_lora(adapter)
    path = folder / LORA_FILES[to]
    metadata, config = file_metadata(record), None
    if to == "original-lora":
        tensors = _original_tensors(lora)
    else:
        rank, alpha = _scale(lora)
        config = peft_settings(lora.layers, rank, alpha) if to == "peft" else None
        metadata |= {} if config else _metadata(lora.layers, rank, alpha)
        tensors = _tensors(PEFT_PREFIX if config else DIFFUSERS_PREFIX, lora.layers)
    for name in (*LORA_FILES.values(), PEFT_CONFIG):  # tensors first: settings alone are not taken for a LoRA
        (folder / name).unlink(missing_ok=True)
    if config:
        _write_config(folder / PEFT_CONFIG, config)
    write_file(path, tensors, metadata)
    return list(lora_files(path))


def _scale(lora: LoraFile) -> tuple[int, float]:
    """Return the rank and the alpha of all layers, as PEFT's settings have them.

    Raises:
        WeightsError: the layers differ, or the LoRA has whole deltas, for which neither PEFT nor diffusers has a name.
    """
    if lora.deltas:
        raise WeightsError(
            f"{lora.path} has whole deltas of {join_names(lora.deltas, FEW)}, for which this layout has no place; use "
            "--to original-lora, or merge it with --base"
        )
    scales = {(layer.rank, layer.alpha) for layer in lora.layers.values()}
    if len(scales) > 1:
        raise WeightsError(
            f"{lora.path} has several pairs of rank and alpha, {preview(sorted(scales))}; expected one pair; use "
            "--to original-lora, which has a place for each"
        )
    ((rank, alpha),) = scales
    return rank, alpha


def _tensors(prefix: str, layers: Mapping[str, LoraLayer]) -> dict[str, Content]:
    tensors: dict[str, Content] = {}
    for name, layer in layers.items():
        tensors |= {f"{prefix}{name}.lora_A.weight": layer.down, f"{prefix}{name}.lora_B.weight": layer.up}
    return tensors


def _original_tensors(lora: LoraFile) -> dict[str, Content]:
    """Return a LoRA's tensors as ComfyUI names them: original names, alphas, and whole deltas as `.diff`, `.diff_b`."""
    tensors: dict[str, Content] = {}
    for name, rule in original_rules(lora.path, lora.additions).items():
        module, _, kind = f"{ORIGINAL_PREFIX}{rule.original}".rpartition(".")
        for addition in lora.additions[name]:
            if isinstance(addition, LoraLayer):
                up = to_original(rule, {name: addition.up})
                tensors |= {f"{module}.lora_A.weight": addition.down, f"{module}.lora_B.weight": up}
                tensors[f"{module}.alpha"] = Loaded(torch.tensor(float(addition.alpha)))
            else:
                delta = {"weight": f"{module}.diff", "bias": f"{module}.diff_b"}.get(kind, f"{module}.{kind}.diff")
                tensors[delta] = to_original(rule, {name: addition.tensor})
    return tensors


def peft_settings(layers: Iterable[str], rank: int, alpha: float) -> dict[str, Any]:
    """Return PEFT's settings of a LoRA.

    Only those that the formula needs: a version of PEFT refuses settings that it does not know.
    """
    whole = int(alpha) if alpha == int(alpha) else alpha  # most readers expect an integer
    return {"r": rank, "lora_alpha": whole, "target_modules": sorted(layers)}


def _write_config(path: Path, settings: Mapping[str, Any]) -> None:
    """Write PEFT's settings as PEFT does, but with its sets in order: equal settings give equal bytes."""
    config = LoraConfig(**settings, inference_mode=True).to_dict()
    ordered = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    write_json(path, dict(sorted(ordered.items())))


def _metadata(layers: Iterable[str], rank: int, alpha: float) -> dict[str, str]:
    """Return the metadata in which diffusers looks for the settings."""
    settings = peft_settings(layers, rank, alpha)
    return {SETTINGS: json.dumps({DIFFUSERS_PREFIX + name: value for name, value in settings.items()}, sort_keys=True)}
