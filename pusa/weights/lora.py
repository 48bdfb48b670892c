"""Write a LoRA without its base, in the layout of diffusers or of PEFT."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import Tensor

from pusa.errors import WeightsError
from pusa.manifest.training import Lora
from pusa.system.files import write_json
from pusa.weights.adapters import LORA_FILE, PEFT_CONFIG, PEFT_FILE, SETTINGS, lora_files, read_lora
from pusa.weights.lora_names import DIFFUSERS_PREFIX, PEFT_PREFIX
from pusa.weights.tensors import write_file
from pusa.weights.write import file_metadata, save_tensors


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
    """Write a LoRA of any known layout into `folder`, in place of a LoRA of either layout there.

    Args:
        adapter: the LoRA's file.
        folder: after a kill it holds the old LoRA, none, or the new one.
        to: "lora", diffusers' layout, for `load_lora_weights(folder)`; or "peft", for
            `PeftModel.from_pretrained(transformer, folder)`.
        record: the record kept in the metadata.

    Returns:
        The files written.

    Raises:
        WeightsError: the layers differ in rank or alpha.
    """
    lora = read_lora(adapter)
    scales = {(layer.rank, layer.alpha) for layer in lora.layers.values()}
    if len(scales) > 1:
        raise WeightsError(f"{lora.path} has several pairs of rank and alpha, {sorted(scales)}; expected one pair")
    ((rank, alpha),) = scales
    prefix, path = (PEFT_PREFIX, folder / PEFT_FILE) if to == "peft" else (DIFFUSERS_PREFIX, folder / LORA_FILE)
    for name in (LORA_FILE, PEFT_FILE, PEFT_CONFIG):  # tensors first: settings without tensors are not taken for a LoRA
        (folder / name).unlink(missing_ok=True)
    metadata = file_metadata(record)
    if to == "peft":
        _write_config(folder / PEFT_CONFIG, peft_settings(lora.layers, rank, alpha))
    else:
        metadata |= _metadata(lora.layers, rank, alpha)
    tensors = {f"{prefix}{name}.lora_A.weight": layer.down for name, layer in lora.layers.items()}
    tensors |= {f"{prefix}{name}.lora_B.weight": layer.up for name, layer in lora.layers.items()}
    write_file(path, tensors, metadata)
    return list(lora_files(path))


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
