"""From what a manifest calls a model to where its parts lie, downloading what is not there yet."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

from pusa.errors import WeightsError
from pusa.manifest import LatentSpaceName, ModelSpec
from pusa.weights import PARTS
from pusa.weights.addition import find_adapter
from pusa.weights.hub import PREFIX, HubName, cached_file, fetch_file, fetch_parts, look
from pusa.weights.source import Source, find_part

BUILTIN = Path(__file__).parent.parent / "builtin"


def locate(spec: ModelSpec, part: str) -> Source:
    """Where a part of a manifest's model lies, downloaded if need be; the transformer is the checkpoint's, if any.

    Where the checkpoint is a LoRA, it is the weights' own with the LoRA beside it.

    `last` is followed here, once: the step it points to never changes, while `last` may move on during a run.

    Raises:
        WeightsError: it is not there, or cannot be downloaded.
    """
    name = _named(spec, part)
    if name == spec.checkpoint and (adapter := _adapter(name, fetch_file)):
        return replace(locate(_without_checkpoint(spec), part), adapter=adapter)
    if name.startswith(PREFIX):
        hub = HubName.parse(name)
        if hub.file and name == spec.checkpoint:
            return Source(part, (fetch_file(hub),))
        return find_part(fetch_parts(hub, [part]), part)
    return _local(name, part, is_checkpoint=name == spec.checkpoint)


def locate_config(spec: ModelSpec, part: str) -> Source:
    """Where a part's shapes are told: as `locate`, but of a model on a hub the configuration alone is downloaded.

    Raises:
        WeightsError: it is not there, or cannot be downloaded.
    """
    name = _named(spec, part)
    if name == spec.checkpoint and _adapter(name, cached_file):
        return locate_config(_without_checkpoint(spec), part)
    if not name.startswith(PREFIX):
        return locate(spec, part)
    hub = HubName.parse(name)
    if name == spec.checkpoint and hub.file:
        there = cached_file(hub)  # if not yet: a fine-tune changes no shape
        return Source(part, (there,)) if there else locate_config(_without_checkpoint(spec), part)
    try:
        return find_part(fetch_parts(hub, [f"{part}/config.json"]), part)
    except WeightsError:  # genmo's layout has no configuration: its files' shapes tell it
        return locate(spec, part)


def require(spec: ModelSpec) -> None:
    """Refuse a model that is not there, before anything of it is downloaded or loaded.

    Raises:
        WeightsError: a part is missing, what the transformer records does not fit the manifest, or a LoRA the weights.
    """
    for part in PARTS:
        name = _named(spec, part)
        if name.startswith(PREFIX):
            look(HubName.parse(name), [part])
        elif name == spec.checkpoint and spec.weights.startswith(PREFIX) and (adapter := _adapter(name, cached_file)):
            look(HubName.parse(spec.weights), [part])
            latent_space(spec, Source(part, (adapter,)))
        elif (source := locate(spec, part)).part == "transformer":
            latent_space(spec, source)
            source.require_base()


def builtin(name: str) -> Path:
    """The folder of a model that is shipped.

    Raises:
        WeightsError: there is no such model.
    """
    known = {f"builtin:{path.parent.name}": path.parent for path in sorted(BUILTIN.glob("*/model_index.json"))}
    if name not in known:
        raise WeightsError(f"unknown built-in model {name!r}; allowed are {', '.join(known)}")
    return known[name]


def latent_space(spec: ModelSpec, transformer: Source) -> str:
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
    return spec.text_encoder if part in ("text_encoder", "tokenizer") and spec.text_encoder else spec.weights


def _without_checkpoint(spec: ModelSpec) -> ModelSpec:
    return spec.model_copy(update={"checkpoint": None})


def _adapter(checkpoint: str, get: Callable[[HubName], Path | None]) -> Path | None:
    """The LoRA file that a checkpoint is, if it is one; `get` says where a file of a hub lies."""
    if checkpoint.startswith(PREFIX):
        hub = HubName.parse(checkpoint)
        file = get(hub) if hub.file else None
        return find_adapter(file) if file else None
    return None if checkpoint.startswith("builtin:") else find_adapter(Path(checkpoint).resolve())


def _local(name: str, part: str, is_checkpoint: bool) -> Source:
    if name.startswith("builtin:"):
        return find_part(builtin(name), part)
    path = Path(name).resolve() if is_checkpoint else Path(name)
    if is_checkpoint and (path.is_file() or (path / "config.json").is_file()):
        return Source(part, (path,))
    if path.is_dir():
        return find_part(path, part)
    if is_checkpoint:
        raise WeightsError(f"checkpoint {name} is not there; was the fine-tune run?")
    allowed = "builtin:NAME, hf:ORG/NAME[@revision], or a folder with a model in diffusers' or genmo's layout"
    raise WeightsError(f"weights {name!r} are no folder; allowed are {allowed}")
