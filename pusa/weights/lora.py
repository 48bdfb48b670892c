"""Write a LoRA alone, as diffusers and PEFT keep it, and add one to the weights that it was learnt on."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from pusa.errors import WeightsError
from pusa.manifest.training import Lora
from pusa.system.files import publish, scratch
from pusa.weights.adapters import (
    DIFFUSERS_PREFIX,
    LORA_FILE,
    PEFT_CONFIG,
    PEFT_FILE,
    PEFT_PREFIX,
    SETTINGS,
    LoraFile,
    lora_files,
    read_lora,
)
from pusa.weights.tensors import Tensors, write_file
from pusa.weights.write import file_metadata


def effective_alpha(method: Lora) -> float:
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
    named = {DIFFUSERS_PREFIX + name: tensor for name, tensor in plain.items()}
    save_file(
        named, path, metadata={**file_metadata(record), **_metadata(layers, method.rank, effective_alpha(method))}
    )
    return path


def copy_lora(adapter: Path, folder: Path, to: str, record: Mapping[str, Any]) -> list[Path]:
    """Write a LoRA of any layout that is read here, in place of one that the folder may hold, in whatever layout.

    Args:
        adapter: its file.
        folder: where to; a kill leaves the old one there, none, or the new one.
        to: "lora", as diffusers keeps it, for `load_lora_weights(folder)`; or "peft", for
            `PeftModel.from_pretrained(transformer, folder)`.
        record: what is said of it in the metadata.

    Returns:
        The files that it consists of.

    Raises:
        WeightsError: it has not one rank and one strength throughout.
    """
    addition = read_lora(adapter)
    rank, alpha = _uniform(addition)
    prefix, path = (PEFT_PREFIX, folder / PEFT_FILE) if to == "peft" else (DIFFUSERS_PREFIX, folder / LORA_FILE)
    for name in (LORA_FILE, PEFT_FILE, PEFT_CONFIG):  # tensors first: without them, settings are no LoRA
        (folder / name).unlink(missing_ok=True)
    metadata = file_metadata(record)
    if to == "peft":
        _write_config(folder / PEFT_CONFIG, peft_settings(addition.layers, rank, alpha))
    else:
        metadata |= _metadata(addition.layers, rank, alpha)
    write_file(path, _named(addition, prefix), metadata)
    return list(lora_files(path))


def peft_settings(layers: Iterable[str], rank: int, alpha: float) -> dict[str, Any]:
    """PEFT's settings of a LoRA, only what the sum needs: another version of PEFT refuses what it does not know."""
    whole = int(alpha) if alpha == int(alpha) else alpha  # the type that most readers expect
    return {"r": rank, "lora_alpha": whole, "target_modules": sorted(layers)}


def _write_config(path: Path, settings: Mapping[str, Any]) -> None:
    """PEFT's settings, by PEFT itself, which writes them into a folder."""
    with scratch(path) as partial:
        LoraConfig(**settings, inference_mode=True).save_pretrained(str(partial))
        publish(partial / path.name, path)


def _uniform(addition: LoraFile) -> tuple[int, float]:
    """The one rank and alpha of a LoRA."""
    found = {(layer.rank, layer.alpha) for layer in addition.layers.values()}
    if len(found) > 1:
        raise WeightsError(f"{addition.path} has several ranks and alphas, {sorted(found)}; written is one of each")
    return found.pop()


def _named(addition: LoraFile, prefix: str) -> Tensors:
    halves = {f"{name}.lora_A.weight": layer.down for name, layer in addition.layers.items()}
    halves |= {f"{name}.lora_B.weight": layer.up for name, layer in addition.layers.items()}
    return {prefix + name: stored for name, stored in halves.items()}


def _metadata(layers: Iterable[str], rank: int, alpha: float) -> dict[str, str]:
    """The settings where diffusers looks for them."""
    settings = peft_settings(layers, rank, alpha)
    return {SETTINGS: json.dumps({DIFFUSERS_PREFIX + name: value for name, value in settings.items()}, sort_keys=True)}
