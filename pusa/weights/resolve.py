"""From what a manifest calls a model to where its parts lie, downloading what is not there yet."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import get_args

from pusa.backbones import find_family
from pusa.errors import WeightsError
from pusa.manifest.models import LatentSpaceName, ModelSpec
from pusa.weights.adapters import PEFT_CONFIG, PEFT_FILE, find_adapter, read_lora, resolve_last
from pusa.weights.hub import HUB_PREFIX, HubName, cached_file, fetch_file, fetch_parts, require_on_hub
from pusa.weights.source import PartFiles, find_part

BUILTIN = Path(__file__).parent.parent / "builtin"


def locate_part(spec: ModelSpec, part: str) -> PartFiles:
    """Where a part of a manifest's model lies, downloaded if need be; the transformer with its LoRA, if any.

    `last` is resolve_last here, once: the step it points to never changes, while `last` may move on during a run.

    Raises:
        WeightsError: it is not there, or cannot be downloaded.
    """
    if part == "transformer" and spec.lora:
        return replace(locate_part(_without_lora(spec), part), adapter=_adapter(spec.lora, fetch_file))
    name = _named(spec, part)
    if part == "transformer" and spec.checkpoint:
        return _fine_tuned(spec.checkpoint)
    if name.startswith(HUB_PREFIX):
        return find_part(fetch_parts(HubName.parse(name), [part]), part)
    return _local(name, part)


def locate_config(spec: ModelSpec, part: str) -> PartFiles:
    """Where a part's shapes are told: as `locate`, but of a model on a hub the configuration alone is downloaded.

    Raises:
        WeightsError: it is not there, or cannot be downloaded.
    """
    name, spec = _named(spec, part), _without_lora(spec)  # a LoRA changes no shape
    if not name.startswith(HUB_PREFIX):
        return locate_part(spec, part)
    hub = HubName.parse(name)
    if part == "transformer" and spec.checkpoint and hub.file:
        there = cached_file(hub)  # if not yet: a fine-tune changes no shape
        return PartFiles(part, (there,)) if there else locate_config(spec.model_copy(update={"checkpoint": None}), part)
    try:
        return find_part(fetch_parts(hub, [f"{part}/config.json"]), part)
    except WeightsError:  # genmo's layout has no configuration: its files' shapes tell it
        return locate_part(spec, part)


def require_model(spec: ModelSpec) -> None:
    """Refuse a model that is not there, before anything of it is downloaded or loaded.

    Of what is on this machine, the headers are read: a LoRA that does not fit its transformer is refused.

    Raises:
        WeightsError: a part is missing, what the transformer records does not fit the manifest, or a LoRA the weights.
    """
    parts = find_family(spec.backbone).parts
    on_hub = {part: _named(spec, part).startswith(HUB_PREFIX) for part in parts}
    for part in parts:
        if on_hub[part]:
            require_on_hub(HubName.parse(_named(spec, part)), [part])
        elif part != "transformer":
            locate_part(spec, part)
    adapter = _adapter(spec.lora, cached_file) if spec.lora else None
    if spec.lora and adapter is None:
        require_on_hub(HubName.parse(spec.lora), [])
    if not on_hub["transformer"]:
        source = replace(locate_part(_without_lora(spec), "transformer"), adapter=adapter)
        latent_space(spec, source)
        source.lora_layers()
    elif adapter:
        read_lora(adapter)
        latent_space(spec.model_copy(update={"checkpoint": None}), PartFiles("transformer", (adapter,)))


def builtin_folder(name: str) -> Path:
    """The folder of a model that is shipped.

    Raises:
        WeightsError: there is no such model.
    """
    known = {f"builtin:{path.parent.name}": path.parent for path in sorted(BUILTIN.glob("*/model_index.json"))}
    if name not in known:
        raise WeightsError(f"unknown built-in model {name!r}; allowed are {', '.join(known)}")
    return known[name]


def latent_space(spec: ModelSpec, transformer: PartFiles) -> str:
    """The space that a model's transformer works in: what it records, else what the manifest says, else "dit".

    Raises:
        WeightsError: the two differ, it is of another backbone, or a checkpoint leaves it open.
    """
    record = transformer.record()
    for name, wanted in (("backbone", spec.backbone), ("latent_space", spec.latent_space)):
        found = record.get(name)
        if found and wanted and found != wanted:
            raise WeightsError(f"checkpoint {transformer} has {name} {found!r}; wanted is {wanted!r}")
    found = record.get("latent_space") or spec.latent_space
    if found is not None and found not in (known := get_args(LatentSpaceName)):
        raise WeightsError(f"checkpoint {transformer} has latent_space {found!r}; known are {', '.join(known)}")
    if found is None and spec.checkpoint is not None:
        raise WeightsError(
            f"checkpoint {spec.checkpoint} does not record its latent space; add `latent_space: dit` or "
            "`latent_space: vae` to the manifest's model (the published Pusa-V0.5 is vae)"
        )
    return found or "dit"


def _named(spec: ModelSpec, part: str) -> str:
    """What the manifest calls the model that has the part."""
    if part == "transformer" and spec.checkpoint:
        return spec.checkpoint
    text_parts = find_family(spec.backbone).text_parts
    return spec.text_encoder if part in text_parts and spec.text_encoder else spec.weights


def _without_lora(spec: ModelSpec) -> ModelSpec:
    return spec.model_copy(update={"lora": None})


def _adapter(name: str, get: Callable[[HubName], Path | None]) -> Path | None:
    """The file of what a manifest calls a LoRA; `get` says where a hub's file lies, or that it does not yet."""
    path = _of_hub(HubName.parse(name), get) if name.startswith(HUB_PREFIX) else _here("lora", name)
    if path is None:
        return None
    if (found := find_adapter(path)) is None:
        raise WeightsError(f"lora {name} is no LoRA; a whole fine-tuned transformer is named as `checkpoint:`")
    return found


def _of_hub(hub: HubName, get: Callable[[HubName], Path | None]) -> Path | None:
    """A LoRA's file, where all that says what it adds is there."""
    if hub.file is None:
        raise WeightsError(f"lora {hub} names no file; the form is {hub}:FILE")
    path = PurePosixPath(hub.file)
    config = get(replace(hub, file=str(path.with_name(PEFT_CONFIG)))) if path.name == PEFT_FILE else Path()
    return get(hub) if config else None


def _fine_tuned(name: str) -> PartFiles:
    """The transformer of what a manifest calls a checkpoint."""
    if name.startswith(HUB_PREFIX):
        hub = HubName.parse(name)
        path = fetch_file(hub) if hub.file else fetch_parts(hub, ["transformer"])
    else:
        path = _here("checkpoint", name)
    if adapter := find_adapter(path):
        raise WeightsError(f"checkpoint {name}: {adapter} is a LoRA; name it as `lora:`, or a transformer's own folder")
    whole = path.is_file() or (path / "config.json").is_file()
    return PartFiles("transformer", (path,)) if whole else find_part(path, "transformer")


def _here(key: str, name: str) -> Path:
    """Where the result of a fine-tune lies on this machine."""
    path = builtin_folder(name) if name.startswith("builtin:") else resolve_last(Path(name))
    if not path.exists():
        raise WeightsError(f"{key} {name} is not there; was the fine-tune run?")
    return path


def _local(name: str, part: str) -> PartFiles:
    if name.startswith("builtin:"):
        return find_part(builtin_folder(name), part)
    if (path := Path(name)).is_dir():
        return find_part(path, part)
    allowed = "builtin:NAME, hf:ORG/NAME[@revision], or a folder with a model in diffusers' or genmo's layout"
    raise WeightsError(f"weights {name!r} are no folder; allowed are {allowed}")
