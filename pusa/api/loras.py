"""Load a LoRA of any naming that Pusa reads as a PEFT adapter of a transformer, as diffusers' pipelines have them."""

import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pusa.backbones.family import Family
from pusa.errors import WeightsError
from pusa.system.text import join_names, preview, printable
from pusa.weights.adapters import LORA_FILE, LoraFile, LoraLayer, read_lora
from pusa.weights.load import read_tensor
from pusa.weights.lora_names import FEW
from pusa.weights.resolve import fetch_adapter
from pusa.weights.stored import read_model

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


class PeftLora:
    """A LoRA in memory: its tensors by diffusers' names, PEFT's settings of it, and the record of its fine-tune."""

    def __init__(self, lora: LoraFile, strength: float) -> None:
        if lora.deltas:
            raise WeightsError(
                f"{lora.path} has whole deltas of {join_names(lora.deltas, FEW)}, for which PEFT has no place; "
                "merge it: `pusa weights export LORA FOLDER --to pipeline --base BASE`"
            )
        self.lora, self.record = lora, read_model(lora.path).record()
        self.tensors: dict[str, Tensor] = {}
        for name, layer in lora.layers.items():
            self.tensors[f"{name}.lora_A.weight"] = _read(name, layer, "down")
            self.tensors[f"{name}.lora_B.weight"] = _read(name, layer, "up")
        first = next(iter(lora.layers.values()))
        # Every layer has its own rank and alpha; the strength is part of alpha, so `set_adapters` multiplies it.
        self.settings: dict[str, Any] = {
            "r": first.rank,
            "lora_alpha": first.alpha * strength,
            "rank_pattern": {f"^{re.escape(name)}": layer.rank for name, layer in lora.layers.items()},
            "alpha_pattern": {f"^{re.escape(name)}": layer.alpha * strength for name, layer in lora.layers.items()},
            "target_modules": list(lora.layers),
        }

    def require_fit(self, transformer: Any, family: Family, part: str, space_name: str) -> None:
        """Check that a transformer is of the kind that the LoRA records, and has its layers.

        Raises:
            WeightsError: it is of another family, expert or latent space, or has other layers.
        """
        if (made_for := self.record.get("backbone")) and made_for != family.name:
            raise WeightsError(f"{self.lora.path} was made for {printable(made_for)}; this pipeline is {family.name}")
        for key, value in {"expert": family.expert_of(part), "latent_space": space_name}.items():
            recorded = self.record.get(key)
            if recorded and value and recorded != value:
                raise WeightsError(f"{self.lora.path} has {key} {recorded!r}; the pipeline's {part} has {value!r}")
        weights = transformer.state_dict()
        shapes = {name.replace(".base_layer.", "."): tuple(weight.shape) for name, weight in weights.items()}
        self.lora.require_fit(shapes)


def open_lora(weights: str | Path | Mapping[str, Tensor], weight_name: str | None, strength: float) -> PeftLora:
    """Read a LoRA into memory.

    Args:
        weights: its file, or a folder or checkpoint with one; "hf:ORG/NAME:FILE"; or tensors by their names.
        weight_name: the file in the folder, or in the repository of that name on the hub.
        strength: multiplies what it adds.

    Raises:
        WeightsError: it cannot be found or read, or has what PEFT has no place for.
    """
    if isinstance(weights, Mapping):
        wrong = [name for name, value in weights.items() if not isinstance(value, Tensor)]
        if wrong or not weights:
            raise WeightsError(f"the LoRA is a mapping with {preview(wrong)}; expected names and tensors")
        with TemporaryDirectory() as folder:
            path = Path(folder) / "lora.safetensors"
            save_file({str(name): tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, path)
            return PeftLora(read_lora(path), strength)
    name = str(weights)
    if not Path(name).exists() and REPOSITORY.fullmatch(name):
        name = f"hf:{name}:{weight_name or LORA_FILE}"
    elif weight_name:
        name = str(Path(name) / weight_name)
    return PeftLora(read_lora(fetch_adapter(name)), strength)


def _read(name: str, layer: LoraLayer, side: str) -> Tensor:
    return read_tensor(f"the LoRA's {side} of {name}", getattr(layer, side), torch.float32)
