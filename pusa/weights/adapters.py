"""A LoRA on disk: which layers it adds to, and how strongly. Only headers are read. No torch here.

Read are diffusers' and PEFT's names (lora_A, lora_B) and kohya's (lora_down, lora_up, alpha), of layers that are called
as diffusers calls them.
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

DIFFUSERS_PREFIX = "transformer."  # diffusers' before each name, since a file may add to several parts of a model
PEFT_PREFIX = "base_model.model."
LORA_FILE, PEFT_FILE, PEFT_CONFIG = (
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "adapter_config.json",
)
SETTINGS = "lora_adapter_metadata"  # diffusers' key, in a file's metadata, of PEFT's settings
LORA_FOLDER = "lora"  # of a checkpoint
MAX_ALPHA = 1e6  # far above any in use: what is larger is an error somewhere

_ROLES = {"lora_A.weight": "down", "lora_down.weight": "down", "lora_B.weight": "up", "lora_up.weight": "up"}
_NAME = re.compile(rf"(.+)\.({'|'.join(map(re.escape, _ROLES))}|alpha)")
_FORMATS = {"F64": "<d", "F32": "<f", "F16": "<e", "BF16": "<f"}  # bfloat16 is the upper half of float32
_FOREIGN = ("use_rslora", "use_dora", "alpha_pattern", "lora_bias", "fan_in_fan_out")  # settings that change the sum


@dataclass(frozen=True)
class LoraLayer:
    """What is added to a layer's weight: alpha / rank * up @ down. Where none is recorded, alpha is the rank."""

    down: StoredTensor  # (rank, in)
    up: StoredTensor  # (out, rank)
    alpha: float

    @property
    def rank(self) -> int:
        """The dimension between the two."""
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it is added to."""
        return self.up.shape[0], self.down.shape[1]


@dataclass(frozen=True)
class LoraFile:
    """A LoRA: what it adds to each layer, by the layer's name in the plain transformer."""

    path: Path
    layers: dict[str, LoraLayer]

    def by_weight(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, LoraLayer]:
        """What is added, by the names of the weights that it is added to.

        Args:
            shapes: of the transformer's weights, by name.

        Raises:
            WeightsError: the transformer lacks a layer, or has it in another shape.
        """
        layers = {f"{name}.weight": layer for name, layer in self.layers.items()}
        wrong = {
            "has no": [name for name in layers if name not in shapes],
            "has other shapes of": [
                f"{name} {layer.shape}, not {shapes[name]}"
                for name, layer in layers.items()
                if shapes.get(name, layer.shape) != layer.shape
            ],
        }
        if any(wrong.values()):
            said = "; ".join(f"{what} {join_names(names)}" for what, names in wrong.items() if names)
            raise WeightsError(f"{self.path} does not fit: the transformer {said}")
        return layers


def find_adapter(path: Path) -> Path | None:
    """The LoRA file that a path is, or that a checkpoint or a folder there holds; None where it is anything else.

    Raises:
        WeightsError: it is a file, but no whole safetensors file.
    """
    if path.is_file():
        return path if read_model(path).layout == "lora" else None
    files = (path / LORA_FILE, path / PEFT_FILE, path / LORA_FOLDER / LORA_FILE)
    return next((file for file in files if file.is_file()), None)


def resolve_last(path: Path) -> Path:
    """Where a path leads, `last` resolve_last. A file keeps its name, which may say what it is, and its neighbours."""
    return path.parent.resolve() / path.name if path.is_file() else path.resolve()


def lora_files(adapter: Path) -> tuple[Path, ...]:
    """The files that say what a LoRA adds: PEFT keeps its settings in a second one."""
    config = adapter.with_name(PEFT_CONFIG)
    return (adapter, config) if adapter.name == PEFT_FILE and config.is_file() else (adapter,)


def read_lora(path: Path) -> LoraFile:
    """The LoRA of a file; of its tensors only the alphas are read.

    Raises:
        WeightsError: it has tensors that are not known here, halves, settings by which another sum is meant, or an
            alpha that makes no sense.
    """
    found = read_model(path)
    settings = _settings(found)
    foreign = [name for name in _FOREIGN if settings.get(name)]
    if foreign:
        raise WeightsError(f"{path} has {join_names(foreign)}; read are LoRAs of alpha / rank * B A alone")
    parts, unknown = _parts(found.tensors)
    unknown += [name for name, part in parts.items() if not _is_whole(part)]
    if unknown or not parts:
        raise WeightsError(f"{path} is no whole LoRA of known layout: {join_names(unknown) or 'it has no tensors'}")
    return LoraFile(path, {name: _layer(found, name, part, settings.get("lora_alpha")) for name, part in parts.items()})


def describe_strength(found: StoredModel) -> str:
    """Which rule a LoRA's file says to add it by, for people."""
    if any(name.endswith(".alpha") for name in found.tensors):
        return "alpha / rank * B A, with each layer's alpha in a tensor"
    alpha = _settings(found).get("lora_alpha")
    return "B A: no alpha is recorded" if alpha is None else f"alpha / rank * B A, with alpha {alpha:g} in the settings"


def _settings(found: StoredModel) -> dict[str, Any]:
    """PEFT's settings, as diffusers keeps them in the metadata, or PEFT beside the file."""
    config = found.path.with_name(PEFT_CONFIG)
    beside = found.path.name == PEFT_FILE and SETTINGS not in found.metadata
    try:
        settings = json.loads(config.read_bytes() if beside else found.metadata.get(SETTINGS, "{}"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{config if beside else found.path}: its settings cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise WeightsError(f"{config if beside else found.path}: its settings are not a JSON object")
    settings = {name.removeprefix(DIFFUSERS_PREFIX): value for name, value in settings.items()}
    if settings.get("lora_alpha") is not None:
        _alpha(found, "lora_alpha", settings["lora_alpha"])
    return settings


def _alpha(found: StoredModel, name: str, alpha: Any) -> float:
    """The same, if it is one."""
    if type(alpha) not in (int, float) or not 0 < alpha <= MAX_ALPHA:
        raise WeightsError(
            f"{found.path} has {name} {preview(alpha)}; allowed are numbers above 0 up to {MAX_ALPHA:.0f}"
        )
    return float(alpha)


def _layer(found: StoredModel, name: str, part: dict[str, Any], alpha: float | None) -> LoraLayer:
    """A layer's own alpha goes before that of the settings."""
    layer = LoraLayer(part["down"], part["up"], part["down"].shape[0] if alpha is None else alpha)
    if "alpha" not in part:
        return layer
    return replace(layer, alpha=_alpha(found, f"{name}.alpha", _number(part["alpha"])))


def _number(stored: StoredTensor) -> float | str:
    """The one number of a tensor; of one that is not of floats the dtype, which is no number."""
    if stored.dtype not in _FORMATS:
        return stored.dtype
    content = bytes(2) * (stored.dtype == "BF16") + stored.read()
    return float(struct.unpack(_FORMATS[stored.dtype], content)[0])


def _parts(tensors: Tensors) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """LoraLayer -> its "down", "up" and, where it has one, "alpha"; and the names that are none of these."""
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


def _is_whole(part: dict[str, Any]) -> bool:
    if not {"down", "up"} <= set(part):
        return False
    down, up = part["down"].shape, part["up"].shape
    single = "alpha" not in part or part["alpha"].shape in ((), (1,))
    return single and len(down) == len(up) == 2 and 0 < down[0] == up[1]
