"""Load a model from single files of either layout, tensor by tensor; any doubt about a name refuses the whole."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from pusa.backbones.base import Backbone
from pusa.errors import PusaError, WeightsError
from pusa.weights.adapters import LoraLayer
from pusa.weights.source import PartFiles
from pusa.weights.stored import read_model
from pusa.weights.tensors import StoredTensor, Tensors

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load_part(backbone: Backbone, source: PartFiles, dtype: torch.dtype) -> Any:
    """Load a part for inference, with a LoRA merged into its weights; any doubt about a name or a shape refuses all.

    Raises:
        WeightsError: the weights do not fit the class, or a LoRA does not fit the weights.
    """
    model_class, layers = backbone.classes[source.part], source.lora_layers()
    load = _load_folder if source.folder else load_files
    model = load(model_class, source, dtype).eval().requires_grad_(False)
    weights = dict(model.named_parameters())
    for name, layer in layers.items():
        weights[name].copy_(merge_lora_layer(name, weights[name], layer))
    return model


def _load_folder(model_class: Any, source: PartFiles, dtype: torch.dtype) -> Any:
    folder = source.paths[0]
    if not (folder / "config.json").is_file():
        raise WeightsError(f"{folder} has no config.json; expected a part of a model in diffusers layout")
    variant = "bf16" if any(folder.glob("*.bf16*")) else None
    try:
        model, info = model_class.from_pretrained(
            folder, torch_dtype=dtype, output_loading_info=True, local_files_only=True, use_safetensors=True,
            variant=variant,
        )  # fmt: skip
    except (OSError, RuntimeError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise WeightsError(f"{folder} cannot be loaded as {model_class.__name__}: {error}") from error
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if wrong:
        raise WeightsError(f"{folder} does not fit {model_class.__name__}: {wrong}")
    return model


def load_files(model_class: Any, source: PartFiles, dtype: torch.dtype) -> Any:
    """The model that the files hold, built to their shapes; in memory are its weights, once, and one tensor more.

    Raises:
        WeightsError: names are missing, unexpected or misshaped, or a dtype is not one of floats.
    """
    model = build(model_class, source)
    tensors = stored_tensors(source, {name: tuple(weight.shape) for name, weight in model.state_dict().items()})
    model.load_state_dict({name: read_tensor(name, stored, dtype) for name, stored in tensors.items()}, assign=True)
    return model


def stored_tensors(source: PartFiles, wanted: Mapping[str, tuple[int, ...]]) -> Tensors:
    """Where each tensor of a part lies, by diffusers' names; none is read yet.

    Args:
        source: the part.
        wanted: the name and shape of each weight that it should have.

    Raises:
        WeightsError: it is another part, or names are missing, unexpected or misshaped.
    """
    found = [read_model(path) for path in source.paths]
    wrong = [model for model in found if model.part != source.part]
    if wrong:
        raise WeightsError(f"{wrong[0].path} is no {source.part}; `pusa weights inspect` says what it is")
    tensors = {name: stored for model in found for name, stored in model.in_diffusers_names().items()}
    _require_fit(source, wanted, tensors)
    return tensors


def build(model_class: Any, source: PartFiles) -> Any:
    """The model that a folder's config, or the shapes in single files, describe, on the meta device: without weights.

    Raises:
        WeightsError: they do not describe one.
    """
    try:
        with torch.device("meta"):
            return _from_files(model_class, source) if not source.folder else _from_config(model_class, source.folder)
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        if isinstance(error, PusaError):
            raise
        raise WeightsError(f"{source} does not configure a {model_class.__name__}: {error!r}") from error


def _from_files(model_class: Any, source: PartFiles) -> Any:
    settings = {name: value for path in source.paths for name, value in read_model(path).config().items()}
    return model_class(**{name: value for name, value in settings.items() if name[0] != "_"})


def _from_config(model_class: Any, folder: Path) -> Any:
    if issubclass(model_class, PreTrainedModel):
        return model_class(model_class.config_class.from_pretrained(folder))
    return model_class.from_config(model_class.load_config(folder))


def _require_fit(source: PartFiles, wanted: Mapping[str, tuple[int, ...]], there: Tensors) -> None:
    wrong = {
        "missing": sorted(set(wanted) - set(there)),
        "unexpected": sorted(set(there) - set(wanted)),
        "misshaped": [
            f"{name} {there[name].shape}, not {wanted[name]}"
            for name in sorted(set(wanted) & set(there))
            if there[name].shape != wanted[name]
        ],
    }
    if any(wrong.values()):
        raise WeightsError(
            f"{source} does not fit: {'; '.join(f'{kind} {names}' for kind, names in wrong.items() if names)}"
        )


def read_tensor(name: str, stored: StoredTensor, dtype: torch.dtype) -> torch.Tensor:
    """One tensor, in memory.

    Raises:
        WeightsError: its dtype is not one of floats, or its file has become shorter.
    """
    if stored.dtype not in DTYPES:
        path = stored.ranges[0].path
        raise WeightsError(f"{path}: {name} has dtype {stored.dtype}; allowed are {', '.join(DTYPES)}")
    content = torch.frombuffer(stored.read(), dtype=DTYPES[stored.dtype])
    return content.reshape(stored.shape).to(dtype)


def merge_lora_layer(name: str, weight: torch.Tensor, layer: LoraLayer) -> torch.Tensor:
    """Return W + alpha / rank * B A, summed in fp32, in W's dtype and on its device.

    Raises:
        WeightsError: the sum, which becomes the weight `name`, is not finite.
    """
    up, down = (read_tensor(name, part, torch.float32).to(weight.device) for part in (layer.up, layer.down))
    total = (weight.float() + layer.alpha / layer.rank * (up @ down)).to(weight.dtype)
    if not total.isfinite().all():
        raise WeightsError(f"{layer.up.ranges[0].path}: merged into {name}, it makes values that are not finite")
    return total
