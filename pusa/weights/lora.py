"""Write a LoRA without its base: in the layout of diffusers, of PEFT, or with the original names as ComfyUI does."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from pusa.backbones.family import Rule
from pusa.errors import WeightsError
from pusa.manifest.training import Lora
from pusa.system.files import write_json
from pusa.system.text import join_names, preview
from pusa.weights.adapters import (
    LORA_FILE,
    LORA_FILES,
    PEFT_CONFIG,
    SETTINGS,
    Delta,
    LoraFile,
    LoraLayer,
    lora_files,
    read_lora,
)
from pusa.weights.load import DTYPES, read_tensor
from pusa.weights.lora_names import DIFFUSERS_PREFIX, FEW, ORIGINAL_PREFIX, PEFT_PREFIX, original_rules
from pusa.weights.stored import to_original
from pusa.weights.tensors import Content, concatenate, write_file
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
    for rule in original_rules(lora.path, lora.additions):
        module, _, kind = f"{ORIGINAL_PREFIX}{rule.original}".rpartition(".")
        updates = [(name, update) for name in rule.diffusers for update in lora.additions.get(name, ())]
        if layers := {name: update for name, update in updates if isinstance(update, LoraLayer)}:
            down, up, alpha = _join(lora.path, rule, layers)
            tensors |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
            tensors[f"{module}.alpha"] = Loaded(torch.tensor(alpha))
        if deltas := {name: update.tensor for name, update in updates if isinstance(update, Delta)}:
            if missing := [name for name in rule.diffusers if name not in deltas]:
                raise WeightsError(
                    f"{lora.path} has whole deltas of {join_names([*deltas])}, but none of {join_names(missing)}, with "
                    "which the original layout joins them into one weight; merge it with --base"
                )
            delta = {"weight": f"{module}.diff", "bias": f"{module}.diff_b"}.get(kind, f"{module}.{kind}.diff")
            tensors[delta] = to_original(rule, deltas)
    return tensors


def _join(path: Path, rule: Rule, layers: Mapping[str, LoraLayer]) -> tuple[Content, Content, float]:
    """Return A, B and alpha of one layer in place of those whose weights the original layout joins into one.

    Layers of one A were one before, and become it again, byte for byte. Else the A are stacked, and the B form a block
    diagonal, so the rank is the sum of the ranks; layers of another alpha / rank than the first have it in their B.
    """
    first, *_ = layers.values()
    if len(layers) == len(rule.diffusers) and {(layer.down, layer.alpha) for layer in layers.values()} == {
        (first.down, first.alpha)
    }:
        return first.down, to_original(rule, {name: layer.up for name, layer in layers.items()}), first.alpha
    rows = _rows(path, rule, layers)
    scales = {name: layer.alpha / layer.rank for name, layer in layers.items()}
    scale = first.alpha / first.rank
    dtypes = {DTYPES.get(layer.up.dtype) for layer in layers.values()}
    dtype = dtypes.pop() if len({*scales.values()}) == len(dtypes) == 1 else None
    blocks = []
    for name in rule.diffusers:
        if name in layers:
            up = read_tensor(f"the LoRA's B of {name}", layers[name].up, dtype or torch.float32).flatten(1)
            blocks.append(up if scales[name] == scale else up * (scales[name] / scale))
        else:
            blocks.append(torch.zeros(rows[name], 0, dtype=dtype))
    down = concatenate(layers[name].down for name in rule.diffusers if name in layers)
    return down, Loaded(torch.block_diag(*blocks)), scale * down.shape[0]


def _rows(path: Path, rule: Rule, layers: Mapping[str, LoraLayer]) -> dict[str, int]:
    """Return the rows of each weight that the original layout joins into one, even if the LoRA does not change it."""
    (outputs, inputs), *_ = (layer.shape for layer in layers.values())
    rows = {name: inputs if rule.squares else outputs for name in rule.diffusers}
    if rule.squares and (last := rule.diffusers[-1]) not in layers:
        raise WeightsError(
            f"{path} cannot be written in original names: there {join_names([*layers])} are joined with {last}, which "
            "it does not change, and whose size it does not show; use --to lora or --to peft"
        )
    return rows | {name: layer.shape[0] for name, layer in layers.items()}


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
