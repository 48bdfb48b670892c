"""Load parts of a model from files of any layout. A missing, unexpected or misshaped tensor refuses the whole part."""

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
    """Load a part for inference, with its LoRA, if any, merged into the weights.

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
    """Load a model from single files, built to their shapes. In memory are the weights and one tensor more.

    Raises:
        WeightsError: a tensor is missing, unexpected or misshaped, or its dtype is not a float.
    """
    model = build(model_class, source)
    tensors = stored_tensors(source, {name: tuple(weight.shape) for name, weight in model.state_dict().items()})
    model.load_state_dict({name: read_tensor(name, stored, dtype) for name, stored in tensors.items()}, assign=True)
    return model


def stored_tensors(source: PartFiles, shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    """Return the stored tensors of a part by diffusers' names, without reading their contents.

    Args:
        source: the files of the part.
        shapes: the name and the shape of each weight that the part must have.

    Raises:
        WeightsError: the files hold another part, or a tensor is missing, unexpected or misshaped.
    """
    models = [read_model(path) for path in source.paths]
    others = [model for model in models if model.part != source.part]
    if others:
        raise WeightsError(f"{others[0].path} is not a {source.part}; `pusa weights inspect` shows what it is")
    tensors = {name: stored for model in models for name, stored in model.in_diffusers_names().items()}
    _require_fit(source, shapes, tensors)
    return tensors


def build(model_class: Any, source: PartFiles) -> Any:
    """Build a model without weights, on the meta device, from a folder's config or from the shapes in single files.

    Raises:
        WeightsError: the config or the shapes do not fit the class.
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


def _require_fit(source: PartFiles, shapes: Mapping[str, tuple[int, ...]], tensors: Tensors) -> None:
    problems = {
        "missing": sorted(set(shapes) - set(tensors)),
        "unexpected": sorted(set(tensors) - set(shapes)),
        "misshaped": [
            f"{name}: expected {shapes[name]}, got {tensors[name].shape}"
            for name in sorted(set(shapes) & set(tensors))
            if tensors[name].shape != shapes[name]
        ],
    }
    if any(problems.values()):
        message = "; ".join(f"{problem} {names}" for problem, names in problems.items() if names)
        raise WeightsError(f"{source} does not fit: {message}")


def read_tensor(name: str, stored: StoredTensor, dtype: torch.dtype) -> torch.Tensor:
    """Read one tensor into memory.

    Raises:
        WeightsError: its dtype is not a float, or its file became shorter.
    """
    if stored.dtype not in DTYPES:
        path = stored.ranges[0].path
        raise WeightsError(f"{path}: {name} has dtype {stored.dtype}; expected one of {', '.join(DTYPES)}")
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
        raise WeightsError(f"{layer.up.ranges[0].path}: merged into {name}, it gives values that are not finite")
    return total
