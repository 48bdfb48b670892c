"""Find the files of the parts of a manifest's model; files on a hub are downloaded."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath

from pusa.backbones import find_family
from pusa.backbones.family import Family
from pusa.backbones.settings import read_small
from pusa.errors import WeightsError
from pusa.manifest.network import LoraSpec, ModelSpec
from pusa.system.files import read_object
from pusa.system.text import preview, printable
from pusa.weights.adapters import LORA_FILE, PEFT_CONFIG, PEFT_FILE, find_adapter, lacks_config, read_lora, resolve_last
from pusa.weights.hub import HUB_PREFIX, HubName, cached_file, fetch_config, fetch_file, fetch_parts, require_on_hub
from pusa.weights.source import BUILTIN, Adapter, PartFiles, find_part, with_settings
from pusa.weights.stored import RECORD_FILE

MODEL_INDEX = "model_index.json"


def locate_part(spec: ModelSpec, part: str) -> PartFiles:
    """Return the files of a part, after a download if necessary; a transformer's with its LoRAs, if any.

    The link `last` is resolved here, once: it may change during a run, while the step it points to never does.

    Raises:
        WeightsError: the part is missing, or cannot be downloaded.
    """
    if loras := _loras_of(spec, part):
        adapters = [Adapter(fetch_adapter(lora.weights), lora.strength, lora.expert) for lora in loras]
        return replace(locate_part(without_loras(spec), part), adapters=tuple(adapters))
    name, family = _model_name(spec, part), find_family(spec.backbone)
    if spec.checkpoint_of(part):
        return _fine_tuned(name, part, family)
    if part in family.vaes and spec.vae and (file := _file_named(name)):
        return PartFiles(part, (with_settings(file),))
    if name.startswith(HUB_PREFIX):
        return find_part(fetch_parts(HubName.parse(name), [part], family), part, family)
    return _local(name, part, family)


def locate_config(spec: ModelSpec, part: str) -> PartFiles:
    """Return the files that give a part's shapes: as `locate_part`, but a hub model downloads its configuration alone.

    Raises:
        WeightsError: it is not there, or cannot be downloaded.
    """
    name, spec = _model_name(spec, part), without_loras(spec)  # a LoRA changes no shape
    if not name.startswith(HUB_PREFIX):
        return locate_part(spec, part)
    hub = HubName.parse(name)
    if spec.checkpoint_of(part) and hub.file:
        if cached := cached_file(hub):
            return PartFiles(part, (cached,))
        return locate_config(spec.model_copy(update={"checkpoint": None}), part)  # a fine-tune changes no shape
    try:
        return PartFiles(part, (fetch_config(hub, part, find_family(spec.backbone)),))
    except WeightsError:  # some original layouts have none; it is derived from the shapes in their files
        return locate_part(spec, part)


def require_model(spec: ModelSpec) -> None:
    """Check a manifest's model before anything is downloaded or loaded.

    Of files on this machine the headers are read, to refuse a LoRA that does not fit its transformer.

    Raises:
        WeightsError: a part is missing, a transformer's record differs from the manifest, or a LoRA does not fit.
    """
    family = find_family(spec.backbone)
    on_hub = {part: not is_here(spec, part) for part in family.parts}
    for part in family.parts:
        if on_hub[part]:
            require_on_hub(HubName.parse(_model_name(spec, part)), [part], family)
        elif part not in family.transformers:
            locate_part(spec, part)
    if family.experts and not spec.weights.startswith(HUB_PREFIX):
        boundary(spec)
    spaces = {part: _require_transformer(spec, part, on_hub[part]) for part in family.transformers}
    require_one_space({part: space for part, space in spaces.items() if space})


def _require_transformer(spec: ModelSpec, part: str, on_hub: bool) -> str | None:
    """Check a transformer's record, and each of its LoRAs: by its header if it is here, else that the hub has it.

    Returns:
        The transformer's latent space; None if it is on the hub.
    """
    adapters = []
    for lora in _loras_of(spec, part):
        if path := _adapter(lora.weights, download=False):
            adapters.append(Adapter(path, lora.strength, lora.expert))
        else:
            for file in _lora_on_hub(HubName.parse(lora.weights)):
                require_on_hub(file, [])
    if not on_hub:
        source = replace(locate_part(without_loras(spec), part), adapters=tuple(adapters))
        space = latent_space(spec, source)
        source.additions()
        return space
    for adapter in adapters:
        read_lora(adapter.path)
        adapter.require_expert()
        latent_space(spec.model_copy(update={"checkpoint": None}), PartFiles(part, (adapter.path,)))
    return None


def builtin_folder(name: str) -> Path:
    """Return the folder of a built-in model.

    Raises:
        WeightsError: the name is unknown.
    """
    known = {f"builtin:{path.parent.name}": path.parent for path in sorted(BUILTIN.glob("*/model_index.json"))}
    if name not in known:
        raise WeightsError(f"unknown built-in model {name!r}; expected one of {', '.join(known)}")
    return known[name]


def boundary(spec: ModelSpec) -> float | None:
    """Return the level from which on the first of a model's two transformers denoises; None if it has only one.

    It is `boundary_ratio` of the model's index, or the family's own where the model has no index or states none.

    Raises:
        WeightsError: it is not a number in [0, 1].
    """
    family = find_family(spec.backbone)
    if not family.experts:
        return None
    if spec.weights.startswith(HUB_PREFIX):
        hub = HubName.parse(spec.weights)
        path = fetch_parts(hub, ()) / MODEL_INDEX  # which every choice of files includes
    else:
        path = Path(spec.weights) / MODEL_INDEX
    stated = read_small(path).get("boundary_ratio") if path.exists() else None
    if stated is None:
        return family.boundary
    if isinstance(stated, bool) or not isinstance(stated, int | float) or not 0 <= stated <= 1:
        raise WeightsError(f"{path} has boundary_ratio {preview(stated)}; expected a number from 0 to 1")
    return float(stated)


def latent_space(spec: ModelSpec, transformer: PartFiles) -> str:
    """Return a transformer's latent space: the recorded one, else the manifest's, else the family's first.

    Raises:
        WeightsError: the two differ, the record has another backbone or expert, or for a checkpoint neither is known.
    """
    record, name = transformer.record(), spec.checkpoint_of(transformer.part)
    family = find_family(spec.backbone)
    expert, known = family.expert_of(transformer.part), family.latent_spaces
    for key, expected in (("backbone", spec.backbone), ("latent_space", spec.latent_space), ("expert", expert)):
        recorded = record.get(key)
        if recorded and expected and recorded != expected:
            raise WeightsError(
                f"{transformer.part} {transformer} has {key} {recorded!r}; the manifest has {expected!r}"
            )
    space = record.get("latent_space") or spec.latent_space
    if space is not None and space not in known:
        raise WeightsError(
            f"{transformer.part} {transformer} has latent_space {space!r}; expected {' or '.join(known)}"
        )
    if space is None and name is not None and len(known) > 1:
        raise WeightsError(
            f"checkpoint {name} does not record its latent space; add `latent_space: dit` or "
            "`latent_space: vae` to the manifest's model (the published Pusa-V0.5 is vae)"
        )
    return space or known[0]


def require_one_space(spaces: Mapping[str, str]) -> None:
    """Check that transformers which denoise the same latents have the same latent space.

    Raises:
        WeightsError: they differ.
    """
    if len(set(spaces.values())) > 1:
        found = ", ".join(f"{part} has {space!r}" for part, space in spaces.items())
        raise WeightsError(f"the transformers have different latent spaces: {found}; they must have the same")


def _model_name(spec: ModelSpec, part: str) -> str:
    """Return the manifest's name of the model that has the part."""
    if checkpoint := spec.checkpoint_of(part):
        return checkpoint
    family = find_family(spec.backbone)
    if part in family.vaes and spec.vae:
        return spec.vae
    return spec.text_encoder if part in family.text_parts and spec.text_encoder else spec.weights


def _file_named(name: str) -> Path | None:
    """Return the file that a name is of, after a download if necessary; None if it is of a whole model."""
    if name.startswith(HUB_PREFIX):
        hub = HubName.parse(name)
        return fetch_file(hub) if hub.file else None
    return Path(name) if Path(name).is_file() else None


def is_here(spec: ModelSpec, part: str) -> bool:
    """Return whether a part is on this machine, and not on a hub. Its LoRAs do not count."""
    return not _model_name(spec, part).startswith(HUB_PREFIX)


def without_loras(spec: ModelSpec) -> ModelSpec:
    """Return a manifest's model without its LoRAs."""
    return spec.model_copy(update={"lora": None, "loras": ()})


def _loras_of(spec: ModelSpec, part: str) -> list[LoraSpec]:
    """Return the LoRAs of a part: without an expert, those of the only transformer."""
    family = find_family(spec.backbone)
    only = family.transformers[0]
    return [lora for lora in spec.adapters if (family.experts[lora.expert] if lora.expert else only) == part]


def fetch_adapter(name: str) -> Path:
    """Return the file of a manifest's LoRA, after a download if necessary."""
    path = _adapter(name, download=True)
    assert path is not None, "it was downloaded"
    return path


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


def _fine_tuned(name: str, part: str, family: Family) -> PartFiles:
    """Return the files of a manifest's checkpoint.

    A folder has the transformer under its own name. Where it has another of the family's only, that one is meant: its
    record says whether it is of the right expert.
    """
    if name.startswith(HUB_PREFIX):
        hub = HubName.parse(name)
        path = fetch_file(hub) if hub.file else fetch_parts(hub, [part], family)
    else:
        path = _local_path("checkpoint", name)
    if adapter := find_adapter(path):
        raise WeightsError(
            f"checkpoint {name}: {adapter} is a LoRA; name it as `lora:`, or name a transformer's own folder"
        )
    if path.is_file():
        has_config = any(file.original_class for file in family.layout.files_of(part))  # not all shows in the shapes
        return PartFiles(part, (with_settings(path) if has_config else path,))
    folders = (path, *(path / transformer for transformer in (part, *family.transformers)))
    own = next((folder for folder in folders if (folder / "config.json").is_file()), None)
    return PartFiles(part, (own,)) if own else find_part(path, part, family)


def is_lora(name: str) -> bool:
    """Return whether a fine-tune is a LoRA; one on a hub counts as none.

    Raises:
        WeightsError: there is nothing of this name.
    """
    return not name.startswith(HUB_PREFIX) and find_adapter(_local_path("fine-tune", name)) is not None


def _local_path(key: str, name: str) -> Path:
    """Return the path of a fine-tune's result on this machine."""
    path = builtin_folder(name) if name.startswith("builtin:") else resolve_last(Path(name))
    if not path.exists():
        raise WeightsError(f"{key} {name} does not exist; was the fine-tune run?")
    return path


def _local(name: str, part: str, family: Family) -> PartFiles:
    if name.startswith("builtin:"):
        return find_part(builtin_folder(name), part, family)
    if (path := Path(name)).is_dir():
        if isinstance(base := read_object(path / RECORD_FILE).get("base"), dict):
            key, weights = "lora" if find_adapter(path) else "checkpoint", printable(base.get("weights"))
            raise WeightsError(
                f"{name} is a checkpoint of `pusa finetune`: give it as `{key}`, with its base, {weights}, as `weights`"
            )
        return find_part(path, part, family)
    expected = "builtin:NAME, hf:ORG/NAME[@revision], or a folder with a model in diffusers' or an original layout"
    raise WeightsError(f"weights {name!r} is not a folder; expected {expected}")
