"""Load a model from single files of either layout, tensor by tensor; any doubt about a name refuses the whole."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pusa.errors import PusaError, WeightsError
from pusa.weights.source import Source
from pusa.weights.stored import read_model
from pusa.weights.tensors import Stored, Tensors

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load_files(model_class: Any, source: Source, dtype: torch.dtype) -> Any:
    """The model that the files hold, built to their shapes; in memory are its weights, once, and one tensor more.

    Raises:
        WeightsError: names are missing, unexpected or misshaped, or a dtype is not one of floats.
    """
    model = build(model_class, source)
    tensors = stored_tensors(source, {name: tuple(weight.shape) for name, weight in model.state_dict().items()})
    model.load_state_dict({name: read_tensor(name, stored, dtype) for name, stored in tensors.items()}, assign=True)
    return model


def stored_tensors(source: Source, wanted: Mapping[str, tuple[int, ...]]) -> Tensors:
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


def build(model_class: Any, source: Source) -> Any:
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


def _from_files(model_class: Any, source: Source) -> Any:
    settings = {name: value for path in source.paths for name, value in read_model(path).config().items()}
    return model_class(**{name: value for name, value in settings.items() if name[0] != "_"})


def _from_config(model_class: Any, folder: Path) -> Any:
    if issubclass(model_class, PreTrainedModel):
        return model_class(model_class.config_class.from_pretrained(folder))
    return model_class.from_config(model_class.load_config(folder))


def _require_fit(source: Source, wanted: Mapping[str, tuple[int, ...]], there: Tensors) -> None:
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


def read_tensor(name: str, stored: Stored, dtype: torch.dtype) -> torch.Tensor:
    """One tensor, in memory.

    Raises:
        WeightsError: its dtype is not one of floats, or its file has become shorter.
    """
    if stored.dtype not in DTYPES:
        path = stored.ranges[0].path
        raise WeightsError(f"{path}: {name} has dtype {stored.dtype}; allowed are {', '.join(DTYPES)}")
    content = torch.frombuffer(stored.read(), dtype=DTYPES[stored.dtype])
    return content.reshape(stored.shape).to(dtype)
