"""Read a LoRA on disk: which layers it changes, and its scale. Only headers and alphas are read, without torch.

The names of diffusers and PEFT (lora_A, lora_B) and of kohya (lora_down, lora_up, alpha) are known. The layers must
have diffusers' names. Alpha is recorded in a tensor of each layer, in PEFT's settings in the file's metadata, or in
PEFT's settings in a file beside it. Where several record it, they must agree.
"""

import math
import re
import struct
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pusa.backbones.settings import MAX_BYTES, require_small
from pusa.errors import WeightsError
from pusa.system.names import log_once
from pusa.system.text import join_names, preview, printable
from pusa.weights.lora_settings import find_misfits, find_refused
from pusa.weights.stored import StoredModel, read_model
from pusa.weights.tensors import StoredTensor, parse_unique, refuse_pickle

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
_FORMATS = {
    "F64": "<d", "F32": "<f", "F16": "<e", "BF16": "<f",  # bfloat16 is the upper half of float32
    "I64": "<q", "I32": "<i", "I16": "<h", "I8": "<b", "U64": "<Q", "U32": "<I", "U16": "<H", "U8": "<B",
}  # fmt: skip
_ALPHA_PRECISION = 2**-8  # of bfloat16, the coarsest dtype of an alpha

Settings = dict[str, dict[str, Any]]  # where they were found -> PEFT's settings


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
    strength: str  # the formula by which it is added, and where its alpha is recorded

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
        WeightsError: the path is a file, but not a complete safetensors file; or a folder whose LoRA is a pickle.
    """
    if path.is_file():
        return path if read_model(path).layout == "lora" else None
    files = (path / LORA_FILE, path / PEFT_FILE, path / LORA_FOLDER / LORA_FILE)
    found = next((file for file in files if file.is_file()), None)
    for pickled in (file.with_suffix(".bin") for file in files if found is None):
        if pickled.is_file():
            refuse_pickle(str(pickled))
    return found


def resolve_last(path: Path) -> Path:
    """Return a path with its links resolved, such as `last`.

    Of a file, only the folder is resolved: its own name may tell its kind, and its settings may lie beside it.
    """
    return path.parent.resolve() / path.name if path.is_file() else path.resolve()


def lora_files(adapter: Path) -> tuple[Path, ...]:
    """Return the files of a LoRA: PEFT keeps its settings in a second file."""
    config = _config_of(read_model(adapter))
    return (adapter, config) if config else (adapter,)


def read_lora(path: Path) -> LoraFile:
    """Read the LoRA of a file. Of its tensors only the alphas are read.

    Raises:
        WeightsError: a tensor is unknown or lacks its counterpart, a setting asks for another formula or does not fit
            the tensors, or an alpha is missing, out of range, or recorded twice with different values.
    """
    return _read(read_model(path))


def describe_strength(model: StoredModel) -> str:
    """Return the formula by which a LoRA is added, and where its alpha is recorded; or why it is refused."""
    try:
        return _read(model).strength
    except WeightsError as error:
        return f"refused: {error}"


def lacks_config(path: Path) -> bool:
    """Return whether a LoRA can be read only with PEFT's settings beside it, which are not there."""
    model = read_model(path)
    recorded = model.metadata.keys() & {SETTINGS, "lora_alpha"} or any(
        name.endswith(".alpha") for name in model.tensors
    )
    return _is_peft(model) and not recorded and not _config_of(model)


def _read(model: StoredModel) -> LoraFile:
    path, config, settings = model.path, _config_of(model), _settings(model)
    if refused := [f"{place} has {text}" for place, values in settings.items() for text in find_refused(values)]:
        raise WeightsError(f"only alpha / rank * B A can be added; {'; '.join(refused)}")
    parts = _parts(model)
    ranks = {name: part["down"].shape[0] for name, part in parts.items()}
    for place, values in settings.items():
        if misfits := find_misfits(values, ranks, own=place != str(config)):
            raise WeightsError(
                f"{place} does not fit the tensors of {path}: {'; '.join(misfits)}; if it is another LoRA's, give each "
                "LoRA a folder of its own"
            )
    common = {
        place: _checked_alpha(place, "lora_alpha", values.get("lora_alpha")) for place, values in settings.items()
    }
    own = {
        name: _checked_alpha(str(path), f"{name}.alpha", _number(part["alpha"]))
        for name, part in parts.items()
        if "alpha" in part
    }
    _require_agreement(model, ranks, common, own)
    alpha = next(iter(common.values()), None)
    layers = {
        name: LoraLayer(part["down"], part["up"], own.get(name, ranks[name] if alpha is None else alpha))
        for name, part in parts.items()
    }
    if config and path.name != PEFT_FILE:
        log_once(f"{path} has the alpha {alpha:g} of {config}, which lies beside it")
    if len(own) == len(parts):
        return LoraFile(path, layers, "alpha / rank * B A, with each layer's alpha in a tensor")
    where = PEFT_CONFIG if config else "the settings"
    recorded = "B A: no alpha is recorded" if alpha is None else f"alpha / rank * B A, with alpha {alpha:g} in {where}"
    return LoraFile(path, layers, recorded)


def _config_of(model: StoredModel) -> Path | None:
    """Return the file with PEFT's settings beside a LoRA, if it may be the LoRA's.

    It is for names of PEFT, and for names without a prefix, as PEFT gives them for a model without its wrapper, if
    these have no alpha of their own. diffusers' names and kohya's have a scale without it.
    """
    config = (model.path if model.path.is_dir() else model.path.parent) / PEFT_CONFIG
    names = model.tensors.keys()
    alone = SETTINGS not in model.metadata and not any(
        name.startswith(DIFFUSERS_PREFIX) or name.endswith((".alpha", ".lora_down.weight")) for name in names
    )
    return config if (_is_peft(model) or alone) and config.is_file() else None


def _is_peft(model: StoredModel) -> bool:
    """Return whether PEFT wrote the file: it never records alpha in it."""
    return model.path.name == PEFT_FILE or any(name.startswith(PEFT_PREFIX) for name in model.tensors)


def _settings(model: StoredModel) -> Settings:
    """Return PEFT's settings: diffusers keeps them in the metadata, PEFT in a file beside the weights."""
    path, metadata = model.path, model.metadata
    found: Settings = {f"{SETTINGS} in {path}": _parse(str(path), metadata.get(SETTINGS, "{}"))}
    if "lora_alpha" in metadata:
        found[f"the metadata of {path}"] = {"lora_alpha": _as_number(metadata["lora_alpha"])}
    found = {place: values for place, values in found.items() if values}
    if config := _config_of(model):
        try:
            require_small(config, MAX_BYTES)
            found[str(config)] = _parse(str(config), config.read_bytes())
        except OSError as error:
            raise WeightsError(f"{config}: its settings cannot be read: {error}") from error
    return found


def _parse(place: str, text: str | bytes) -> dict[str, Any]:
    """Return PEFT's settings of the transformer. diffusers names the part of the model before each setting."""
    try:
        settings = parse_unique(text)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{place}: its settings cannot be read: {printable(error)}") from error
    if not isinstance(settings, dict):
        raise WeightsError(f"{place}: its settings are not a JSON object; got {preview(settings)}")
    named = {name.removeprefix(DIFFUSERS_PREFIX): value for name, value in settings.items()}
    if len(named) != len(settings):
        raise WeightsError(f"{place} has the same setting both with and without the prefix {DIFFUSERS_PREFIX!r}")
    return {name: value for name, value in named.items() if "." not in name}


def _as_number(text: str) -> float | str:
    """Return the number that a text of the metadata is, or else the text."""
    try:
        return float(text)
    except ValueError:
        return text


def _checked_alpha(place: str, name: str, alpha: Any) -> float:
    """Return `alpha` as a float; raise WeightsError if it is out of range or not a number."""
    if type(alpha) not in (int, float) or not 0 < alpha <= MAX_ALPHA:
        raise WeightsError(
            f"{place} has {printable(name)} {preview(alpha)}; expected a number above 0 up to {MAX_ALPHA:.0f}"
        )
    return float(alpha)


def _require_agreement(
    model: StoredModel, ranks: Mapping[str, int], common: Mapping[str, float], own: Mapping[str, float]
) -> None:
    """Check that every layer has one alpha: no place is ignored in favour of another.

    Args:
        model: the LoRA.
        ranks: the rank of each layer.
        common: the alpha of all layers, by where it is recorded.
        own: the alpha of each layer that has a tensor of it.
    """
    path = model.path
    for place, alpha in common.items():
        recorded = {**common, **{f"{name}.alpha": value for name, value in own.items()}}
        others = {
            other: value
            for other, value in recorded.items()
            if not math.isclose(value, alpha, rel_tol=_ALPHA_PRECISION)
        }
        if others:
            other, value = next(iter(others.items()))
            raise WeightsError(
                f"{path} has two alphas: {alpha:g} in {place}, {value:g} in {printable(other)}; remove the wrong one"
            )
    without = [name for name in ranks if name not in own]
    if own and without and not common:
        raise WeightsError(
            f"{path} has an alpha for some layers, but none for {join_names(without)}; expected all or none"
        )
    if own or common:
        return
    if _is_peft(model):
        raise WeightsError(
            f"{path} has no alpha: PEFT keeps it in {PEFT_CONFIG}; put that file beside it, or write there "
            f'{{"peft_type": "LORA", "r": {next(iter(ranks.values()))}, "lora_alpha": ALPHA}}'
        )
    for key, text in model.metadata.items():  # of other tools, such as kohya's ss_network_alpha
        if key.endswith("alpha") and isinstance(number := _as_number(text), float) and {*ranks.values()} != {number}:
            raise WeightsError(
                f"the metadata of {path} has {printable(key)} {preview(text)}, but no tensor has an alpha; if B A "
                f"includes it, remove that key, else give each layer a tensor LAYER.alpha"
            )


def _number(stored: StoredTensor) -> float | str:
    """Return the number in a tensor of one number; for a tensor of another dtype, the dtype's name."""
    if stored.dtype not in _FORMATS:
        return stored.dtype
    content = bytes(2) * (stored.dtype == "BF16") + stored.read()
    return float(struct.unpack(_FORMATS[stored.dtype], content)[0])


def _parts(model: StoredModel) -> dict[str, dict[str, StoredTensor]]:
    """Return layer -> its tensors "down", "up" and perhaps "alpha".

    Raises:
        WeightsError: a tensor is unknown, lacks its counterpart or does not fit it.
    """
    parts: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    wrong: dict[str, list[str]] = defaultdict(list)
    for name, stored in model.tensors.items():
        match = _NAME.fullmatch(name.removeprefix(DIFFUSERS_PREFIX).removeprefix(PEFT_PREFIX))
        role = _ROLES.get(match[2], "alpha") if match else ""
        if not match or role in parts[match[1]]:
            wrong["unknown"].append(name)
        else:
            parts[match[1]][role] = stored
    for name, part in parts.items():
        factors = [part[role].shape for role in ("down", "up") if role in part]
        if not factors:
            wrong["an alpha without its lora_A and lora_B"].append(name)
        elif len(factors) == 1:
            wrong["a lora_A or lora_B without the other"].append(name)
        elif not (len(factors[0]) == len(factors[1]) == 2 and 0 < factors[0][0] == factors[1][1]):
            wrong["a lora_A and a lora_B that do not fit each other"].append(name)
        if "alpha" in part and math.prod(part["alpha"].shape) != 1:
            wrong["an alpha that is not one number"].append(name)
    if wrong or not parts:
        problems = "; ".join(f"{kind}: {join_names(names)}" for kind, names in wrong.items())
        raise WeightsError(f"{model.path} is not a complete LoRA of a known layout; {problems or 'it has no tensors'}")
    return dict(parts)
