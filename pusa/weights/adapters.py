"""Read a LoRA on disk: which layers it changes, and its scale. Only headers and alphas are read, without torch.

`lora_names` knows the names that tools give to tensors and layers. Alpha is recorded in a tensor of each layer, in
PEFT's settings in the file's metadata, or in PEFT's settings in a file beside it. Where several record it, they must
agree.
"""

import math
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
from pusa.weights.lora_names import (
    DELTAS,
    DIFFUSERS_PREFIX,
    FEW,
    ORIGINAL_PREFIX,
    PEFT_PREFIX,
    Modules,
    find_spelling,
    read_modules,
)
from pusa.weights.lora_settings import find_misfits, find_refused
from pusa.weights.stored import LORA_DELTAS, StoredModel, read_model
from pusa.weights.tensors import StoredTensor, parse_unique, refuse_pickle

LORA_FILE, PEFT_FILE, PEFT_CONFIG = (
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "adapter_config.json",
)
# The layouts in which `pusa weights export` writes a LoRA. The last has the names of the family's original layout.
LORA_FILES = {"lora": LORA_FILE, "peft": PEFT_FILE, "original-lora": "lora.safetensors"}
SETTINGS = "lora_adapter_metadata"  # the key in a file's metadata under which diffusers keeps PEFT's settings
LORA_FOLDER = "lora"  # in a checkpoint
MAX_ALPHA = 1e6  # far above any in use; a larger one is an error

_FORMATS = {
    "F64": "<d", "F32": "<f", "F16": "<e", "BF16": "<f",  # bfloat16 is the upper half of float32
    "I64": "<q", "I32": "<i", "I16": "<h", "I8": "<b", "U64": "<Q", "U32": "<I", "U16": "<H", "U8": "<B",
}  # fmt: skip
_ALPHA_PRECISION = 2**-8  # of bfloat16, the coarsest dtype of an alpha

Settings = dict[str, dict[str, Any]]  # where they were found -> PEFT's settings


@dataclass(frozen=True)
class LoraLayer:
    """A low-rank addition to a weight: alpha / rank * up @ down. If no alpha is recorded, alpha is the rank."""

    down: StoredTensor  # (rank, in), of a convolution (rank, in, kernel...)
    up: StoredTensor  # (out, rank), of a convolution perhaps (out, rank, 1...)
    alpha: float

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """Return the tensors on disk."""
        return self.up, self.down

    @property
    def rank(self) -> int:
        """Return the dimension between `down` and `up`."""
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape (out, in, kernel...) of the weight that it is added to."""
        return self.up.shape[0], *self.down.shape[1:]


@dataclass(frozen=True)
class Delta:
    """A whole addition to a weight, a bias or a modulation."""

    tensor: StoredTensor

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """Return the tensors on disk."""
        return (self.tensor,)

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the weight that it is added to."""
        return self.tensor.shape


Addition = LoraLayer | Delta


@dataclass(frozen=True)
class LoraFile:
    """A LoRA: what it adds to each weight, by the weight's name in the transformer of diffusers."""

    path: Path
    additions: dict[str, tuple[Addition, ...]]
    strength: str  # the formula by which it is added, and where its alpha is recorded

    @property
    def layers(self) -> dict[str, LoraLayer]:
        """Return the low-rank additions by the names of their layers."""
        pairs = ((name, update) for name, updates in self.additions.items() for update in updates)
        return {name.removesuffix(".weight"): update for name, update in pairs if isinstance(update, LoraLayer)}

    @property
    def deltas(self) -> dict[str, Delta]:
        """Return the whole additions by the names of their weights."""
        pairs = ((name, update) for name, updates in self.additions.items() for update in updates)
        return {name: update for name, update in pairs if isinstance(update, Delta)}

    def require_fit(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check that a transformer has every weight, in its shape, that the LoRA adds to.

        Args:
            shapes: the shapes of the transformer's weights, by name.

        Raises:
            WeightsError: it lacks a weight, or the weight has another shape.
        """
        problems = {
            "has no": [name for name in self.additions if name not in shapes],
            "has other shapes of": [
                f"{name}: the LoRA's is {update.shape}, the transformer's {shapes[name]}"
                for name, updates in self.additions.items()
                for update in updates
                if shapes.get(name, update.shape) != update.shape
            ],
        }
        if any(problems.values()):
            message = "; ".join(f"{problem} {join_names(names, FEW)}" for problem, names in problems.items() if names)
            raise WeightsError(f"{self.path} does not fit: the transformer {message}")


def find_adapter(path: Path) -> Path | None:
    """Return the LoRA file at a path: the file itself, or the one in a folder or checkpoint; None if there is none.

    Raises:
        WeightsError: the path is a file, but not a complete safetensors file; or a folder whose LoRA is a pickle.
    """
    if path.is_file():
        return path if read_model(path).layout == "lora" else None
    files = (*(path / name for name in LORA_FILES.values()), path / LORA_FOLDER / LORA_FILE)
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
    modules = read_modules(model)
    ranks = {name: tensors["down"].shape[0] for name, tensors in modules.items() if "down" in tensors}
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
        name: _checked_alpha(str(path), f"{name}.alpha", _number(tensors["alpha"]))
        for name, tensors in modules.items()
        if "alpha" in tensors
    }
    _require_agreement(model, ranks, common, own)
    alpha = next(iter(common.values()), None)
    alphas = {name: own.get(name, float(rank) if alpha is None else alpha) for name, rank in ranks.items()}
    if config and path.name != PEFT_FILE:
        log_once(f"{path} has the alpha {alpha:g} of {config}, which lies beside it")
    formula = "W + strength * alpha / rank * B A, with "
    if ranks and len(own) == len(ranks):
        formula += "each layer's alpha in a tensor"
    elif alpha is not None:
        formula += f"alpha {alpha:g} in {PEFT_CONFIG if config else 'the settings'}"
    else:
        formula = "W + strength * B A: no alpha is recorded, so alpha = rank"
    if any(role in DELTAS for tensors in modules.values() for role in tensors):
        formula = f"{formula}; W + strength * delta" if ranks else "W + strength * delta"
    return LoraFile(path, _additions(path, modules, alphas), formula)


def _additions(path: Path, modules: Modules, alphas: Mapping[str, float]) -> dict[str, tuple[Addition, ...]]:
    """Return what is added to each weight, by diffusers' names; names that no family has stay as they are."""
    spelling = find_spelling(modules)
    found: dict[str, list[Addition]] = defaultdict(list)
    for module, tensors in modules.items():
        shapes = [tensors[role].shape for role in ("down", "diff") if role in tensors]
        inputs = next((shape[1] for shape in shapes if len(shape) > 1), None)
        if "down" in tensors:
            for name, up in spelling.in_diffusers_names(module, "weight", tensors["up"], inputs):
                found[name].append(LoraLayer(tensors["down"], up, alphas[module]))
        for role, kind in DELTAS.items():
            if role in tensors:
                for name, delta in spelling.in_diffusers_names(module, kind, tensors[role], inputs):
                    found[name].append(Delta(delta))
    twice = [name for name, updates in found.items() if len({*map(type, updates)}) < len(updates)]
    if twice:
        raise WeightsError(f"{path} has additions of one kind twice to {join_names(twice)}, under different names")
    return {name: tuple(updates) for name, updates in found.items()}


def _config_of(model: StoredModel) -> Path | None:
    """Return the file with PEFT's settings beside a LoRA, if it may be the LoRA's.

    It is for names of PEFT, and for names without a prefix, as PEFT gives them for a model without its wrapper, if
    these have no alpha of their own. diffusers', ComfyUI's and kohya's names have a scale without it.
    """
    config = (model.path if model.path.is_dir() else model.path.parent) / PEFT_CONFIG
    names = model.tensors.keys()
    alone = SETTINGS not in model.metadata and not any(
        name.startswith((DIFFUSERS_PREFIX, ORIGINAL_PREFIX))
        or name.endswith((".alpha", ".lora_down.weight", *LORA_DELTAS))
        for name in names
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
    for key, text in _stated_alphas(model, ranks).items():
        if _is_of_another_rank(model, key, ranks):
            log_once(
                f"{path} has no tensor with an alpha, so alpha = rank, as ComfyUI has it; {printable(key)} "
                f"{preview(text)} in its metadata is of the LoRA before its ranks were changed"
            )
        else:
            raise WeightsError(
                f"the metadata of {path} has {printable(key)} {preview(text)}, but no tensor has an alpha; if B A "
                f"includes it, remove that key, else give each layer a tensor LAYER.alpha"
            )


def _stated_alphas(model: StoredModel, ranks: Mapping[str, int]) -> dict[str, str]:
    """Return the alphas other than the ranks in the metadata of other tools, such as kohya's ss_network_alpha."""
    return {
        key: text
        for key, text in model.metadata.items()
        if key.endswith("alpha") and isinstance(number := _as_number(text), float) and {*ranks.values()} != {number}
    }


def _is_of_another_rank(model: StoredModel, key: str, ranks: Mapping[str, int]) -> bool:
    """Return whether an alpha of the metadata is of a LoRA of another rank, from which this one was made.

    A tool that changes the ranks, by layer or all, folds alpha into B A, but may keep the metadata. kohya's states the
    rank beside alpha, in ss_network_dim.
    """
    stated = _as_number(model.metadata.get(key.replace("alpha", "dim"), ""))
    return len({*ranks.values()}) > 1 or (isinstance(stated, float) and stated not in ranks.values())


def _number(stored: StoredTensor) -> float | str:
    """Return the number in a tensor of one number; for a tensor of another dtype, the dtype's name."""
    if stored.dtype not in _FORMATS:
        return stored.dtype
    content = bytes(2) * (stored.dtype == "BF16") + stored.read()
    return float(struct.unpack(_FORMATS[stored.dtype], content)[0])
