"""Load parts of a model from files of any layout. A missing, unexpected or misshaped tensor refuses the whole part.

Nothing of a model's folder runs, and no library chooses what is read: the classes are the family's own, the settings
are checked against its ranges, and the tensors are read here, each checked for values that are not finite.
"""

import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from diffusers import ModelMixin
from transformers import PreTrainedModel

from pusa.backbones.base import Backbone
from pusa.backbones.settings import check_settings
from pusa.errors import WeightsError
from pusa.system.failures import Failure, attempt
from pusa.system.text import join_names, printable
from pusa.weights.adapters import Addition, Delta
from pusa.weights.source import PartFiles
from pusa.weights.stored import CONFIG, list_misfits, read_model, read_settings
from pusa.weights.tensors import StoredTensor, Tensors

Device = str | torch.device
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load_part(backbone: Backbone, source: PartFiles, dtype: torch.dtype, device: Device = "cpu") -> Any:
    """Load a part for inference into main memory, with its LoRAs merged; meanwhile memory holds a few tensors more.

    Args:
        backbone: what the part belongs to.
        source: its files.
        dtype: of the weights, but for those that the model keeps in fp32.
        device: where LoRAs are merged, weight by weight.

    Raises:
        WeightsError: the settings are out of range, a tensor is missing, unexpected, misshaped or not finite, or a LoRA
            does not fit the weights.
    """
    source = source.in_fixed_order()
    additions = source.additions()
    model = build(backbone, source)
    tensors = stored_tensors(source, {name: tuple(w.shape) for name, w in model.state_dict().items()}, model)
    values = {
        name: read_merged(name, stored, dtype_of(model, name, dtype), additions.get(name, ()), device).cpu()
        for name, stored in tensors.items()
    }
    model.load_state_dict(values, assign=True)
    if isinstance(model, PreTrainedModel):
        model.tie_weights()
    backbone.finish(source.part, model)
    if missing := [name for name, buffer in model.named_buffers() if buffer.is_meta]:
        raise WeightsError(f"{source} cannot be loaded: no file has the values of {join_names(missing)}")
    return model.eval().requires_grad_(False)


def stored_tensors(source: PartFiles, shapes: Mapping[str, tuple[int, ...]], model: Any = None) -> Tensors:
    """Return the stored tensors of a part by diffusers' names, without reading their contents.

    Args:
        source: the files of the part.
        shapes: the name and the shape of each weight that the part must have.
        model: one of transformers states which names are one weight, and which tensors are of another use.

    Raises:
        WeightsError: the files hold another part, or a tensor is missing, unexpected or misshaped.
    """
    models = [read_model(path) for path in source.paths]
    # Only a folder, which has a configuration, may hold a part whose tensors no family's layout describes.
    others = [m for m in models if not m.may_be(source.part) and (m.part or not source.folder)]
    if others:
        raise WeightsError(f"{others[0].path} is not a {source.part}; `pusa weights inspect` shows what it is")
    tensors = {name: stored for model in models for name, stored in model.in_diffusers_names().items()}
    tensors = {name: stored for name, stored in tensors.items() if name in shapes or not is_unused(model, name)}
    for names in (getattr(model, "_tied_weights_keys", None) or {}).items():
        if known := next((tensors[name] for name in reversed(names) if name in tensors), None):
            tensors |= dict.fromkeys(names, known)
    _require_fit(source, shapes, tensors)
    return tensors


def build(backbone: Backbone, source: PartFiles) -> Any:
    """Build a model without weights, on the meta device, from a folder's config or from the shapes in single files.

    Raises:
        WeightsError: a setting is missing or out of the family's range, or the settings do not fit each other.
    """
    settings, place = part_settings(backbone, source)
    model_class = backbone.classes[source.part]

    model = attempt(partial(without_weights, model_class, settings), None)  # unfit settings may raise anything
    if isinstance(model, Failure):
        raise WeightsError(f"{place} does not configure a {model_class.__name__}: {printable(model.message)}")
    return model


def without_weights(model_class: Any, settings: Mapping[str, Any]) -> Any:
    """Return a model of diffusers or of transformers with these settings, on the meta device."""
    with torch.device("meta"):
        if issubclass(model_class, PreTrainedModel):
            return model_class(model_class.config_class(**settings))
        return model_class(**settings)


def is_unused(model: Any, name: str) -> bool:
    """Return whether a tensor is of another use, as models of transformers state it."""
    rules = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(rule, name) for rule in rules)


def part_settings(backbone: Backbone, source: PartFiles) -> tuple[dict[str, Any], str]:
    """Return the settings of a part, from a folder's config or from the shapes in single files, and where they are.

    Raises:
        WeightsError: a setting is missing or out of the family's range.
    """
    if source.folder:
        values, place = read_settings(source.folder / CONFIG), str(source.folder / CONFIG)
    else:
        values = {name: value for path in source.paths for name, value in read_model(path).config().items()}
        # Each file's part of the settings names the class; the tensors have decided it already.
        values, place = {name: value for name, value in values.items() if name[0] != "_"}, str(source)
    try:
        return check_settings(backbone.settings[source.part], values, place).arguments(), place
    except WeightsError as error:
        raise WeightsError(f"{error}; it was read as the {source.part} of a {backbone.family.name}") from error


def dtype_of(model: Any, name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a weight of a model that computes in `dtype`: some of diffusers' models keep a few in fp32.

    It is decided by the rule of their `from_pretrained`. In models of transformers the same list is for fp16 only.
    """
    kept = model._keep_in_fp32_modules or () if isinstance(model, ModelMixin) else ()
    return torch.float32 if set(kept) & set(name.split(".")) else dtype


def cast(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Give every weight of a model that computes in `dtype` its dtype."""
    for name, weight in model.named_parameters():
        weight.data = weight.data.to(dtype_of(model, name, dtype))


def _require_fit(source: PartFiles, shapes: Mapping[str, tuple[int, ...]], tensors: Tensors) -> None:
    misshaped = [
        f"{name}: expected {shapes[name]}, got {tensors[name].shape}"
        for name in sorted(set(shapes) & set(tensors))
        if tensors[name].shape != shapes[name]
    ]
    missing, unexpected = sorted(set(shapes) - set(tensors)), sorted(set(tensors) - set(shapes))
    if misfits := list_misfits(missing=missing, unexpected=unexpected, misshaped=misshaped):
        raise WeightsError(f"{source} does not fit: {misfits}")


def read_tensor(name: str, stored: StoredTensor, dtype: torch.dtype) -> torch.Tensor:
    """Read one tensor into memory.

    Raises:
        WeightsError: its dtype is not a float, its file became shorter, or a value is not finite in `dtype`.
    """
    path = stored.ranges[0].path
    if stored.dtype not in DTYPES:
        raise WeightsError(f"{path}: {printable(name)} has dtype {stored.dtype}; expected one of {', '.join(DTYPES)}")
    content, at = torch.empty(stored.nbytes, dtype=torch.uint8), 0
    for chunk in stored.chunks():
        content[at : (at := at + len(chunk))] = torch.frombuffer(bytearray(chunk), dtype=torch.uint8)
    tensor = content.view(DTYPES[stored.dtype]).reshape(stored.shape).to(dtype)
    if not is_finite(tensor):
        raise WeightsError(f"{path}: {printable(name)} has values that are not finite as {dtype}")
    return tensor


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether all values are finite, without a copy: as fast as memory is read, twenty times `isfinite`."""
    return not tensor.numel() or all(bool(edge.isfinite()) for edge in torch.aminmax(tensor))


def read_merged(
    name: str, stored: StoredTensor, dtype: torch.dtype, additions: Iterable[tuple[float, Addition]], device: Device
) -> torch.Tensor:
    """Read a weight with what LoRAs add to it: W + strength * alpha / rank * B A + ..., on `device` if there is any.

    The sum is made in fp32 in the given order, and rounded once. What has strength 0 is not added, so that not even the
    sign of a zero differs.

    Args:
        name: of the weight.
        stored: W.
        dtype: of the result.
        additions: the strength of each LoRA, and what it adds.
        device: where the sum is made.

    Raises:
        WeightsError: a tensor cannot be read, or the sum is not finite.
    """
    additions = [(strength, addition) for strength, addition in additions if strength]
    if not additions:
        return read_tensor(name, stored, dtype)
    total = read_tensor(name, stored, torch.float32).to(device)
    for strength, addition in additions:
        total += _scaled(name, addition, strength, device)
    total = total.to(dtype)
    if not is_finite(total):
        paths = {str(tensor.ranges[0].path): None for _, addition in additions for tensor in addition.tensors}
        raise WeightsError(f"{', '.join(paths)}: merged into {name}, the sum has values that are not finite as {dtype}")
    return total


def _scaled(name: str, addition: Addition, strength: float, device: Device) -> torch.Tensor:
    if isinstance(addition, Delta):
        return read_tensor(f"the LoRA's change of {name}", addition.tensor, torch.float32).to(device).mul_(strength)
    up = read_tensor(f"the LoRA's B of {name}", addition.up, torch.float32).to(device)
    down = read_tensor(f"the LoRA's A of {name}", addition.down, torch.float32).to(device)
    product = (up.flatten(1) @ down.flatten(1)).mul_(strength * (addition.alpha / addition.rank))
    return product.reshape(addition.shape)
