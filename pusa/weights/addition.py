"""A LoRA on disk: which layers it adds to, and how strongly. Only headers are read. No torch here.

Read are diffusers' and PEFT's names (lora_A, lora_B) and kohya's (lora_down, lora_up, alpha), of layers that are called
as diffusers calls them.
"""

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pusa.errors import WeightsError
from pusa.files import read_json
from pusa.strict import listed
from pusa.weights.found import Found, read_model
from pusa.weights.tensors import Stored, Tensors

PREFIX = "transformer."  # diffusers' before each name, since a file may add to several parts of a model
PEFT_PREFIX = "base_model.model."
LORA_FILE, PEFT_FILE, PEFT_CONFIG = (
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "adapter_config.json",
)
SETTINGS = "lora_adapter_metadata"  # diffusers' key, in a file's metadata, of PEFT's settings
LORA_FOLDER = "lora"  # of a checkpoint

_ROLES = {"lora_A.weight": "down", "lora_down.weight": "down", "lora_B.weight": "up", "lora_up.weight": "up"}
_NAME = re.compile(rf"(.+)\.({'|'.join(map(re.escape, _ROLES))}|alpha)")
_FOREIGN = ("use_rslora", "use_dora", "alpha_pattern", "lora_bias", "fan_in_fan_out")  # settings that change the sum


@dataclass(frozen=True)
class Layer:
    """What is added to a layer's weight: alpha / rank * up @ down, and up @ down where no alpha is recorded."""

    down: Stored  # (rank, in)
    up: Stored  # (out, rank)
    alpha: float | Stored | None

    @property
    def rank(self) -> int:
        """The dimension between the two."""
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it is added to."""
        return self.up.shape[0], self.down.shape[1]


@dataclass(frozen=True)
class Addition:
    """A LoRA: what it adds to each layer, by the layer's name in the plain transformer."""

    path: Path
    layers: dict[str, Layer]


def find_adapter(path: Path) -> Path | None:
    """The LoRA file that a path is, or that a checkpoint or a folder there holds; None where it is anything else.

    Raises:
        WeightsError: it is a file, but no whole safetensors file.
    """
    if path.is_file():
        return path if read_model(path).layout == "lora" else None
    files = (path / LORA_FOLDER / LORA_FILE, path / LORA_FILE, path / PEFT_FILE)
    return next((file for file in files if file.is_file()), None)


def files_of(adapter: Path) -> tuple[Path, ...]:
    """The files that say what a LoRA adds: PEFT keeps its settings in a second one."""
    config = adapter.with_name(PEFT_CONFIG)
    return (adapter, config) if adapter.name == PEFT_FILE and config.is_file() else (adapter,)


def read_addition(path: Path) -> Addition:
    """The LoRA of a file.

    Raises:
        WeightsError: it has tensors that are not known here, halves, or settings by which another sum is meant.
    """
    found = read_model(path)
    settings = _settings(found)
    foreign = [name for name in _FOREIGN if settings.get(name)]
    if foreign:
        raise WeightsError(f"{path} has {listed(foreign)}; read are LoRAs of alpha / rank * B A alone")
    parts, unknown = _parts(found.tensors)
    unknown += [name for name, part in parts.items() if not _is_whole(part)]
    if unknown or not parts:
        raise WeightsError(f"{path} is no whole LoRA of known layout: {listed(unknown) or 'it has no tensors'}")
    alpha = settings.get("lora_alpha")
    return Addition(path, {n: Layer(p["down"], p["up"], p.get("alpha", alpha)) for n, p in parts.items()})


def strength(found: Found) -> str:
    """Which rule a LoRA's file says to add it by, for people."""
    if any(name.endswith(".alpha") for name in found.tensors):
        return "alpha / rank * B A, with each layer's alpha in a tensor"
    alpha = _settings(found).get("lora_alpha")
    return "B A: no alpha is recorded" if alpha is None else f"alpha / rank * B A, with alpha {alpha:g} in the settings"


def _settings(found: Found) -> dict[str, Any]:
    """PEFT's settings, as diffusers keeps them in the metadata, or PEFT beside the file."""
    if SETTINGS in found.metadata:
        try:
            settings = json.loads(found.metadata[SETTINGS])
        except (ValueError, RecursionError):
            settings = None
    else:
        beside = files_of(found.path)[1:]
        settings = read_json(beside[0]) if beside else {}
    if not isinstance(settings, dict):
        raise WeightsError(f"{found.path}: its settings are not a JSON object")
    settings = {name.removeprefix(PREFIX): value for name, value in settings.items()}
    alpha = settings.get("lora_alpha")
    if not (alpha is None or (isinstance(alpha, int | float) and alpha > 0)):
        raise WeightsError(f"{found.path} has lora_alpha {alpha!r}; allowed are numbers above 0")
    return settings


def _parts(tensors: Tensors) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Layer -> its "down", "up" and, where it has one, "alpha"; and the names that are none of these."""
    parts: dict[str, dict[str, Any]] = defaultdict(dict)
    unknown = []
    for name, stored in tensors.items():
        match = _NAME.fullmatch(name.removeprefix(PREFIX).removeprefix(PEFT_PREFIX))
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
