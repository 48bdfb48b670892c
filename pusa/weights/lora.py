"""Write a LoRA alone, as diffusers and PEFT keep it, and add one to the weights that it was learnt on."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from pusa.errors import WeightsError
from pusa.strict import listed
from pusa.training.settings import Lora
from pusa.weights.addition import LORA_FILE, PEFT_FILE, PEFT_PREFIX, PREFIX, SETTINGS, Addition, Layer, read_addition
from pusa.weights.load import read_tensor
from pusa.weights.source import Source
from pusa.weights.tensors import Stored, Tensors, write_file
from pusa.weights.write import metadata_of


def alpha_of(method: Lora) -> float:
    """The numerator of the addition's strength, alpha / rank."""
    return method.rank if method.alpha is None else method.alpha


def write_lora(folder: Path, tensors: Mapping[str, Tensor], method: Lora, record: Mapping[str, Any]) -> Path:
    """Write a trained LoRA as diffusers keeps it: MochiPipeline.load_lora_weights(folder) takes it.

    Args:
        folder: a scratch folder; made if need be.
        tensors: the added parameters, by their names in the model in training (`...to_q.lora_A.default.weight`).
        method: whose rank and alpha are kept in the metadata, as diffusers does; without them it would add B A alone.
        record: what the fine-tune says of itself.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plain = {name.replace(".default.", "."): tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    layers = {name.rpartition(".lora_")[0] for name in plain}
    path = folder / LORA_FILE
    named = {PREFIX + name: tensor for name, tensor in plain.items()}
    save_file(named, path, metadata={**metadata_of(record), **_metadata(layers, method.rank, alpha_of(method))})
    return path


def copy_lora(adapter: Path, folder: Path, record: Mapping[str, Any]) -> list[Path]:
    """Write a LoRA as diffusers keeps it, from any layout that is read here.

    Raises:
        WeightsError: it has not one rank and one strength throughout.
    """
    addition = read_addition(adapter)
    rank, alpha = _uniform(addition)
    path = folder / LORA_FILE
    metadata = {**metadata_of(record), **_metadata(addition.layers, rank, alpha)}
    write_file(path, _named(addition, PREFIX), metadata)
    return [path]


def to_peft(adapter: Path, folder: Path, record: Mapping[str, Any]) -> list[Path]:
    """Write a LoRA as PEFT keeps it: `PeftModel.from_pretrained(transformer, folder)` takes it.

    Raises:
        WeightsError: it has not one rank and one strength throughout.
    """
    addition = read_addition(adapter)
    rank, alpha = _uniform(addition)
    LoraConfig(**settings_of(addition.layers, rank, alpha), inference_mode=True).save_pretrained(str(folder))
    path = folder / PEFT_FILE
    write_file(path, _named(addition, PEFT_PREFIX), metadata_of(record))
    return [path, folder / "adapter_config.json"]


def additions(source: Source, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Layer]:
    """What a source's LoRA adds, by the names of the weights that it changes; nothing where the source has none.

    Args:
        source: of a transformer.
        shapes: of the transformer's weights, by name.

    Raises:
        WeightsError: it was learnt on another base, or the transformer lacks a layer or has it in another shape.
    """
    if source.adapter is None:
        return {}
    source.require_base()
    layers = {f"{name}.weight": layer for name, layer in read_addition(source.adapter).layers.items()}
    missing = [name for name in layers if name not in shapes]
    misshaped = [
        f"{name} {layer.shape}, not {shapes[name]}"
        for name, layer in layers.items()
        if name not in missing and shapes[name] != layer.shape
    ]
    if missing or misshaped:
        wrong = {"has no": missing, "has other shapes of": misshaped}
        said = "; ".join(f"{what} {listed(names)}" for what, names in wrong.items() if names)
        raise WeightsError(f"{source.adapter} does not fit: the transformer {said}")
    return layers


def added(weight: Tensor, layer: Layer) -> Tensor:
    """W + alpha / rank * B A, summed in fp32, in W's dtype and on its device."""
    up, down = (_tensor(part).to(weight.device) for part in (layer.up, layer.down))
    return (weight.float() + _alpha(layer) / layer.rank * (up @ down)).to(weight.dtype)


def settings_of(layers: Iterable[str], rank: int, alpha: float) -> dict[str, Any]:
    """PEFT's settings of a LoRA, only what the sum needs: another version of PEFT refuses what it does not know."""
    whole = int(alpha) if alpha == int(alpha) else alpha  # the type that most readers expect
    return {"r": rank, "lora_alpha": whole, "target_modules": sorted(layers)}


def _alpha(layer: Layer) -> float:
    """Where none is recorded, the rank: as diffusers and PEFT take it."""
    alpha = _tensor(layer.alpha).item() if isinstance(layer.alpha, Stored) else layer.alpha
    return layer.rank if alpha is None else alpha


def _uniform(addition: Addition) -> tuple[int, float]:
    """The one rank and alpha of a LoRA."""
    found = {(layer.rank, _alpha(layer)) for layer in addition.layers.values()}
    if len(found) > 1:
        raise WeightsError(f"{addition.path} has several ranks and alphas, {sorted(found)}; written is one of each")
    return found.pop()


def _named(addition: Addition, prefix: str) -> Tensors:
    halves = {f"{name}.lora_A.weight": layer.down for name, layer in addition.layers.items()}
    halves |= {f"{name}.lora_B.weight": layer.up for name, layer in addition.layers.items()}
    return {prefix + name: stored for name, stored in halves.items()}


def _metadata(layers: Iterable[str], rank: int, alpha: float) -> dict[str, str]:
    """The settings where diffusers looks for them."""
    settings = settings_of(layers, rank, alpha)
    return {SETTINGS: json.dumps({PREFIX + name: value for name, value in settings.items()}, sort_keys=True)}


def _tensor(stored: Stored) -> Tensor:
    return read_tensor("of a LoRA, a tensor", stored, torch.float32)
