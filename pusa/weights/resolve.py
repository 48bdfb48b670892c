"""Find the files of the parts of a manifest's model; files on a hub are downloaded."""

from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import get_args

from pusa.backbones import find_family
from pusa.errors import WeightsError
from pusa.manifest.network import LatentSpaceName, ModelSpec
from pusa.weights.adapters import LORA_FILE, PEFT_CONFIG, PEFT_FILE, find_adapter, lacks_config, read_lora, resolve_last
from pusa.weights.hub import HUB_PREFIX, HubName, cached_file, fetch_file, fetch_parts, require_on_hub
from pusa.weights.source import BUILTIN, PartFiles, find_part


def locate_part(spec: ModelSpec, part: str) -> PartFiles:
    """Return the files of a part, after a download if necessary; the transformer's with its LoRA, if any.

    The link `last` is resolved here, once: it may change during a run, while the step it points to never does.

    Raises:
        WeightsError: the part is missing, or cannot be downloaded.
    """
    if part == "transformer" and spec.lora:
        return replace(locate_part(_without_lora(spec), part), adapter=_adapter(spec.lora, download=True))
    name = _model_name(spec, part)
    if part == "transformer" and spec.checkpoint:
        return _fine_tuned(spec.checkpoint)
    if name.startswith(HUB_PREFIX):
        return find_part(fetch_parts(HubName.parse(name), [part]), part)
    return _local(name, part)


def locate_config(spec: ModelSpec, part: str) -> PartFiles:
    """Return the files that give a part's shapes: as `locate_part`, but a hub model downloads its configuration alone.

    Raises:
        WeightsError: it is not there, or cannot be downloaded.
    """
    name, spec = _model_name(spec, part), _without_lora(spec)  # a LoRA changes no shape
    if not name.startswith(HUB_PREFIX):
        return locate_part(spec, part)
    hub = HubName.parse(name)
    if part == "transformer" and spec.checkpoint and hub.file:
        if cached := cached_file(hub):
            return PartFiles(part, (cached,))
        return locate_config(spec.model_copy(update={"checkpoint": None}), part)  # a fine-tune changes no shape
    try:
        return find_part(fetch_parts(hub, [f"{part}/config.json"]), part)
    except WeightsError:  # an original layout has no configuration; it is derived from the shapes in its files
        return locate_part(spec, part)


def require_model(spec: ModelSpec) -> None:
    """Check a manifest's model before anything is downloaded or loaded.

    Of files on this machine the headers are read, to refuse a LoRA that does not fit its transformer.

    Raises:
        WeightsError: a part is missing, the transformer's record differs from the manifest, or the LoRA does not fit.
    """
    parts = find_family(spec.backbone).parts
    on_hub = {part: _model_name(spec, part).startswith(HUB_PREFIX) for part in parts}
    for part in parts:
        if on_hub[part]:
            require_on_hub(HubName.parse(_model_name(spec, part)), [part])
        elif part != "transformer":
            locate_part(spec, part)
    adapter = _adapter(spec.lora, download=False) if spec.lora else None
    if spec.lora and adapter is None:
        for file in _lora_on_hub(HubName.parse(spec.lora)):
            require_on_hub(file, [])
    if not on_hub["transformer"]:
        source = replace(locate_part(_without_lora(spec), "transformer"), adapter=adapter)
        latent_space(spec, source)
        source.lora_layers()
    elif adapter:
        read_lora(adapter)
        latent_space(spec.model_copy(update={"checkpoint": None}), PartFiles("transformer", (adapter,)))


def builtin_folder(name: str) -> Path:
    """Return the folder of a built-in model.

    Raises:
        WeightsError: the name is unknown.
    """
    known = {f"builtin:{path.parent.name}": path.parent for path in sorted(BUILTIN.glob("*/model_index.json"))}
    if name not in known:
        raise WeightsError(f"unknown built-in model {name!r}; expected one of {', '.join(known)}")
    return known[name]


def latent_space(spec: ModelSpec, transformer: PartFiles) -> str:
    """Return the transformer's latent space: the recorded one, else the manifest's, else "dit".

    Raises:
        WeightsError: the two differ, the record has another backbone, or for a checkpoint neither is known.
    """
    record = transformer.record()
    for key, expected in (("backbone", spec.backbone), ("latent_space", spec.latent_space)):
        recorded = record.get(key)
        if recorded and expected and recorded != expected:
            raise WeightsError(f"transformer {transformer} has {key} {recorded!r}; the manifest has {expected!r}")
    space = record.get("latent_space") or spec.latent_space
    if space is not None and space not in (known := get_args(LatentSpaceName)):
        raise WeightsError(f"transformer {transformer} has latent_space {space!r}; expected {' or '.join(known)}")
    if space is None and spec.checkpoint is not None:
        raise WeightsError(
            f"checkpoint {spec.checkpoint} does not record its latent space; add `latent_space: dit` or "
            "`latent_space: vae` to the manifest's model (the published Pusa-V0.5 is vae)"
        )
    return space or "dit"


def _model_name(spec: ModelSpec, part: str) -> str:
    """Return the manifest's name of the model that has the part."""
    if part == "transformer" and spec.checkpoint:
        return spec.checkpoint
    text_parts = find_family(spec.backbone).text_parts
    return spec.text_encoder if part in text_parts and spec.text_encoder else spec.weights


def _without_lora(spec: ModelSpec) -> ModelSpec:
    return spec.model_copy(update={"lora": None})


def _adapter(name: str, download: bool) -> Path | None:
    """Return the file of a manifest's LoRA, or None if it is on a hub and must not be downloaded."""
    if name.startswith(HUB_PREFIX):
        get = fetch_file if download else cached_file
        paths = [get(file) for file in _lora_on_hub(HubName.parse(name))]
        path = paths[-1] if all(paths) else None
        if path and not download and lacks_config(path):  # the hub may have it
            return None
    else:
        path = _local_path("lora", name)
    if path is None:
        return None
    if (adapter := find_adapter(path)) is None:
        raise WeightsError(
            f"lora {name} is not a LoRA; name a whole fine-tuned transformer as `checkpoint:`, and a LoRA in a folder "
            f"by its file if that is neither {LORA_FILE} nor {PEFT_FILE}"
        )
    return adapter


def _lora_on_hub(hub: HubName) -> list[HubName]:
    """Return the files that a LoRA on a hub must have; its own file is the last."""
    if hub.file is None:
        raise WeightsError(f"lora {hub} does not name a file; expected {hub}:FILE")
    path = PurePosixPath(hub.file)
    return [replace(hub, file=str(path.with_name(PEFT_CONFIG)))] * (path.name == PEFT_FILE) + [hub]


def _fine_tuned(name: str) -> PartFiles:
    """Return the files of a manifest's checkpoint."""
    if name.startswith(HUB_PREFIX):
        hub = HubName.parse(name)
        path = fetch_file(hub) if hub.file else fetch_parts(hub, ["transformer"])
    else:
        path = _local_path("checkpoint", name)
    if adapter := find_adapter(path):
        raise WeightsError(
            f"checkpoint {name}: {adapter} is a LoRA; name it as `lora:`, or name a transformer's own folder"
        )
    is_transformer = path.is_file() or (path / "config.json").is_file()
    return PartFiles("transformer", (path,)) if is_transformer else find_part(path, "transformer")


def _local_path(key: str, name: str) -> Path:
    """Return the path of a fine-tune's result on this machine."""
    path = builtin_folder(name) if name.startswith("builtin:") else resolve_last(Path(name))
    if not path.exists():
        raise WeightsError(f"{key} {name} does not exist; was the fine-tune run?")
    return path


def _local(name: str, part: str) -> PartFiles:
    if name.startswith("builtin:"):
        return find_part(builtin_folder(name), part)
    if (path := Path(name)).is_dir():
        return find_part(path, part)
    expected = "builtin:NAME, hf:ORG/NAME[@revision], or a folder with a model in diffusers' or an original layout"
    raise WeightsError(f"weights {name!r} is not a folder; expected {expected}")
