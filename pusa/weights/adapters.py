"""Read a LoRA on disk: which layers it changes, and its scale. Only headers and alphas are read, without torch.

The names of diffusers and PEFT (lora_A, lora_B) and of kohya (lora_down, lora_up, alpha) are known. The layers must
have diffusers' names.
"""

import json
import re
import struct
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pusa.errors import WeightsError
from pusa.system.text import join_names, preview
from pusa.weights.stored import StoredModel, read_model
from pusa.weights.tensors import StoredTensor, Tensors

DIFFUSERS_PREFIX = "transformer."  # in diffusers' files, which may change several parts of a model
PEFT_PREFIX = "base_model.model."
LORA_FILE, PEFT_FILE, PEFT_CONFIG = (
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "adapter_config.json",
)
SETTINGS = "lora_adapter_metadata"  # the key in a file's metadata under which diffusers keeps PEFT's settings
LORA_FOLDER = "lora"  # in a checkpoint
MAX_ALPHA = 1e6  # far above any in use; a larger one is an error

_ROLES = {"lora_A.weight": "down", "lora_down.weight": "down", "lora_B.weight": "up", "lora_up.weight": "up"}
_NAME = re.compile(rf"(.+)\.({'|'.join(map(re.escape, _ROLES))}|alpha)")
_FORMATS = {"F64": "<d", "F32": "<f", "F16": "<e", "BF16": "<f"}  # bfloat16 is the upper half of float32
_UNSUPPORTED = (
    "use_rslora",
    "use_dora",
    "alpha_pattern",
    "lora_bias",
    "fan_in_fan_out",
)  # they change the formula


@dataclass(frozen=True)
class LoraLayer:
    """The update of a layer's weight: alpha / rank * up @ down. If no alpha is recorded, alpha is the rank."""

    down: StoredTensor  # (rank, in)
    up: StoredTensor  # (out, rank)
    alpha: float

    @property
    def rank(self) -> int:
        """Return the dimension between `down` and `up`."""
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape (out, in) of the weight that the update is added to."""
        return self.up.shape[0], self.down.shape[1]


@dataclass(frozen=True)
class LoraFile:
    """A LoRA: the update of each layer, by the layer's name in the transformer without LoRA."""

    path: Path
    layers: dict[str, LoraLayer]

    def layers_by_weight(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, LoraLayer]:
        """Return the updates by the name of the weight that each is added to.

        Args:
            shapes: the shapes of the transformer's weights, by name.

        Raises:
            WeightsError: the transformer lacks a layer, or the layer has another shape.
        """
        layers = {f"{name}.weight": layer for name, layer in self.layers.items()}
        problems = {
            "has no": [name for name in layers if name not in shapes],
            "has other shapes of": [
                f"{name}: the LoRA's is {layer.shape}, the transformer's {shapes[name]}"
                for name, layer in layers.items()
                if shapes.get(name, layer.shape) != layer.shape
            ],
        }
        if any(problems.values()):
            message = "; ".join(f"{problem} {join_names(names)}" for problem, names in problems.items() if names)
            raise WeightsError(f"{self.path} does not fit: the transformer {message}")
        return layers


def find_adapter(path: Path) -> Path | None:
    """Return the LoRA file at a path: the file itself, or the one in a folder or checkpoint; None if there is none.

    Raises:
        WeightsError: the path is a file, but not a complete safetensors file.
    """
    if path.is_file():
        return path if read_model(path).layout == "lora" else None
    files = (path / LORA_FILE, path / PEFT_FILE, path / LORA_FOLDER / LORA_FILE)
    return next((file for file in files if file.is_file()), None)


def resolve_last(path: Path) -> Path:
    """Return a path with its links resolved, such as `last`.

    Of a file, only the folder is resolved: its own name may tell its kind, and its settings may lie beside it.
    """
    return path.parent.resolve() / path.name if path.is_file() else path.resolve()


def lora_files(adapter: Path) -> tuple[Path, ...]:
    """Return the files of a LoRA: PEFT keeps its settings in a second file."""
    config = adapter.with_name(PEFT_CONFIG)
    return (adapter, config) if adapter.name == PEFT_FILE and config.is_file() else (adapter,)


def read_lora(path: Path) -> LoraFile:
    """Read the LoRA of a file. Of its tensors only the alphas are read.

    Raises:
        WeightsError: a tensor is unknown or lacks its counterpart, a setting asks for another formula, or an alpha is
            out of range.
    """
    model = read_model(path)
    settings = _settings(model)
    unsupported = [name for name in _UNSUPPORTED if settings.get(name)]
    if unsupported:
        raise WeightsError(f"{path} has the settings {join_names(unsupported)}; only alpha / rank * B A is supported")
    parts, unknown = _parts(model.tensors)
    unknown += [name for name, part in parts.items() if not _is_complete(part)]
    if unknown or not parts:
        raise WeightsError(
            f"{path} is not a complete LoRA of a known layout; wrong: {join_names(unknown) or 'it has no tensors'}"
        )
    return LoraFile(path, {name: _layer(model, name, part, settings.get("lora_alpha")) for name, part in parts.items()})


def describe_strength(model: StoredModel) -> str:
    """Return the formula by which a LoRA is added, and where its alpha is recorded."""
    if any(name.endswith(".alpha") for name in model.tensors):
        return "alpha / rank * B A, with each layer's alpha in a tensor"
    alpha = _settings(model).get("lora_alpha")
    return "B A: no alpha is recorded" if alpha is None else f"alpha / rank * B A, with alpha {alpha:g} in the settings"


def _settings(model: StoredModel) -> dict[str, Any]:
    """Return PEFT's settings: diffusers keeps them in the metadata, PEFT in a file beside the weights."""
    config = model.path.with_name(PEFT_CONFIG)
    in_config = model.path.name == PEFT_FILE and SETTINGS not in model.metadata
    try:
        settings = json.loads(config.read_bytes() if in_config else model.metadata.get(SETTINGS, "{}"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{config if in_config else model.path}: its settings cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise WeightsError(f"{config if in_config else model.path}: its settings are not a JSON object")
    settings = {name.removeprefix(DIFFUSERS_PREFIX): value for name, value in settings.items()}
    if settings.get("lora_alpha") is not None:
        _checked_alpha(model, "lora_alpha", settings["lora_alpha"])
    return settings


def _checked_alpha(model: StoredModel, name: str, alpha: Any) -> float:
    """Return `alpha` as a float; raise WeightsError if it is out of range or not a number."""
    if type(alpha) not in (int, float) or not 0 < alpha <= MAX_ALPHA:
        raise WeightsError(f"{model.path} has {name} {preview(alpha)}; expected a number above 0 up to {MAX_ALPHA:.0f}")
    return float(alpha)


def _layer(model: StoredModel, name: str, part: dict[str, Any], alpha: float | None) -> LoraLayer:
    """Make a layer. Its own alpha has precedence over the alpha of the settings."""
    layer = LoraLayer(part["down"], part["up"], part["down"].shape[0] if alpha is None else alpha)
    if "alpha" not in part:
        return layer
    return replace(layer, alpha=_checked_alpha(model, f"{name}.alpha", _number(part["alpha"])))


def _number(stored: StoredTensor) -> float | str:
    """Return the number in a tensor of one float; for a tensor of another dtype, the dtype's name."""
    if stored.dtype not in _FORMATS:
        return stored.dtype
    content = bytes(2) * (stored.dtype == "BF16") + stored.read()
    return float(struct.unpack(_FORMATS[stored.dtype], content)[0])


def _parts(tensors: Tensors) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return layer -> its tensors "down", "up" and perhaps "alpha"; and the names of all other tensors."""
    parts: dict[str, dict[str, Any]] = defaultdict(dict)
    unknown = []
    for name, stored in tensors.items():
        match = _NAME.fullmatch(name.removeprefix(DIFFUSERS_PREFIX).removeprefix(PEFT_PREFIX))
        role = _ROLES.get(match[2], "alpha") if match else ""
        if not match or role in parts[match[1]]:
            unknown.append(name)
        else:
            parts[match[1]][role] = stored
    return dict(parts), unknown


def _is_complete(part: dict[str, Any]) -> bool:
    if not {"down", "up"} <= set(part):
        return False
    down, up = part["down"].shape, part["up"].shape
    single = "alpha" not in part or part["alpha"].shape in ((), (1,))
    return single and len(down) == len(up) == 2 and 0 < down[0] == up[1]
