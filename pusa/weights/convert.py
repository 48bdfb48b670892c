"""Convert weights between a family's original files and diffusers' folders: bytes are copied, no tensor is loaded.

`pusa weights convert SOURCE FOLDER --to diffusers|genmo|...`. Every file is written atomically, and an index last. Run
again, the command keeps the files that are complete.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pusa.backbones import all_families, all_parts
from pusa.backbones.family import Layout, LayoutFile
from pusa.backbones.settings import read_small
from pusa.errors import WeightsError
from pusa.system.files import remove, write_json
from pusa.system.locks import sole_writer
from pusa.system.text import preview
from pusa.weights.stored import CONFIG, RECORD, RECORD_FILE, StoredModel, find_models
from pusa.weights.tensors import INDEX, StoredTensor, Tensors, is_written, write_file

log = logging.getLogger(__name__)
SHARD_BYTES = 5_000_000_000
NAME = "diffusion_pytorch_model"


def layouts() -> list[str]:
    """Return the names of all layouts of a transformer: diffusers' and the original layout of each family."""
    return list(dict.fromkeys(["diffusers", *(family.layout.name for family in all_families())]))


def convert(
    source: Path, folder: Path, to: str, latent_space: str | None = None, shard_bytes: int = SHARD_BYTES
) -> list[Path]:
    """Write the models of `source` that have another layout into `folder`.

    Args:
        source: a file, a model's folder, or a folder of these.
        folder: the output folder, for original files or for diffusers' folders named as parts.
        to: "diffusers", or a family's original layout such as "genmo".
        latent_space: recorded in the output if the source does not record it.
        shard_bytes: the largest size of diffusers' shards.

    Returns:
        The files of the result.

    Raises:
        WeightsError: the source has nothing to convert, tensors are missing, unexpected or misshaped, or the folder
            cannot be written into.
        StageError: the folder holds files of somebody else, or another process is writing into it.
    """
    others = [name for name in layouts() if name != to] if to == "diffusers" else ["diffusers"]
    models = [model for model in find_models(source) if model.layout in others and model.files]
    if not models:
        raise WeightsError(
            f"{source} has nothing in {' or '.join(others)} layout; `pusa weights inspect` shows what it has"
        )
    unknown = [model for model in models if not model.record() and _has_latent_spaces(model)]
    if to == "diffusers" and not latent_space and unknown:
        log.warning(
            "%s does not record its latent space; to record it, add --latent-space dit or --latent-space vae", source
        )
    with output_folder(folder):
        return write_models(models, folder, to, latent_space, shard_bytes)


@contextmanager
def output_folder(folder: Path) -> Iterator[None]:
    """Lock a folder to write weights into. New folders that stay empty are removed at the end.

    Raises:
        WeightsError: the path is a file, or lies in a checkpoint, which must not change.
        StageError: the folder holds files of somebody else, or another process is writing into it.
    """
    path_and_parents = [folder, *folder.parents]
    if (file := next(filter(Path.is_file, path_and_parents), None)) is not None:
        raise WeightsError(f"{file} is a file; expected a folder to write into")
    real = folder.resolve()
    if (inside := next((path for path in (real, *real.parents) if (path / RECORD_FILE).is_file()), None)) is not None:
        raise WeightsError(f"{folder} lies in the checkpoint {inside}, which must not change; name another folder")
    new = [path for path in (*(folder / part for part in all_parts()), *path_and_parents) if not path.exists()]
    with sole_writer(folder):
        try:
            yield
        finally:
            for path in new:
                if path.is_dir() and {inner.name for inner in path.iterdir()} <= {".lock"}:
                    remove(path)


def write_models(
    models: list[StoredModel], folder: Path, to: str, latent_space: str | None = None, shard_bytes: int = SHARD_BYTES
) -> list[Path]:
    """Write models of any layout, as `convert` does. The caller holds the folder's lock.

    Raises:
        WeightsError: `to` is another family's layout, or a model cannot be written.
    """
    for model in models:
        require_layout(to, _layout_of(model), model.path)
    write = _write_diffusers if to == "diffusers" else _write_original
    return list(write(models, folder, latent_space, shard_bytes))


def require_layout(to: str, layout: Layout, path: Path) -> None:
    """Check that a layout to write is diffusers' or the one of the weights' own family.

    Raises:
        WeightsError: it is another family's.
    """
    if to not in ("diffusers", layout.name):
        raise WeightsError(f"{path} is of a family whose original layout is {layout.name}; got --to {to}")


def diffusers_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with the name of diffusers' class, of which ours is a subclass with the same files.

    A model that is sharded in training is of a subclass of torch's, "FSDP" and the name of ours.
    """
    name = config.get("_class_name")
    own = {"_class_name": name.removeprefix("FSDP").removeprefix("Pusa")} if isinstance(name, str) else {}
    return {**config, **own}


def _write_original(models: list[StoredModel], folder: Path, latent_space: str | None, _: int) -> Iterator[Path]:
    planned: dict[Path, tuple[Tensors, dict[str, str]]] = {}
    configs: dict[Path, dict[str, Any]] = {}
    for model in models:
        metadata = {**_metadata([model], latent_space), **_statistics(model)}
        metadata.pop("format", None)  # the published files have no metadata, and so are restored byte for byte
        for file in model.files:
            if folder / file.name in planned:
                raise WeightsError(f"{model.path} and another model there would both become {file.name}; name one")
            planned[folder / file.name] = model.in_original_names(file), metadata
            if (shards := folder / f"{file.name}{INDEX}").exists():
                raise WeightsError(f"{shards} names another {file.name}, in shards; name another folder to write into")
            if file.original_config:
                config = (folder / file.name).with_name(CONFIG)
                configs[config] = _original_config(file, model)
                if config.exists() and read_small(config).get("_class_name") != file.original_class:
                    raise WeightsError(f"{config} is of another model; name another folder to write into")
    _refuse_own_inputs(planned, models)
    for path, content in planned.items():
        if not is_written(path, *content):
            path.unlink(missing_ok=True)  # else a kill could leave a new encoder beside an old decoder
            if path.with_name(CONFIG) in configs:
                path.with_name(CONFIG).unlink(missing_ok=True)
    for path, content in planned.items():
        path.parent.mkdir(exist_ok=True)
        yield _write(path, *content)
    for path, values in configs.items():
        write_json(path, values)
        yield path


def _original_config(file: LayoutFile, model: StoredModel) -> dict[str, Any]:
    """Return the config.json that a family's authors keep beside a file, checked by reading it back."""
    try:
        assert file.original_config and file.from_original, "the layout has both or none"
        config = file.original_config(model.config())
        file.from_original(config)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise WeightsError(f"{model.path / CONFIG} is incomplete or wrong: {preview(error)}") from error
    return config


def _write_diffusers(
    models: list[StoredModel], folder: Path, latent_space: str | None, shard_bytes: int
) -> Iterator[Path]:
    for part in sorted({str(model.part) for model in models}):
        own = [model for model in models if model.part == part]
        _require_complete(part, own)
        tensors = {name: stored for model in own for name, stored in model.in_diffusers_names().items()}
        config = {name: value for model in own for name, value in model.config().items()}
        stem = own[0].files[0].stem
        shards = _shards(tensors, shard_bytes, stem)
        _refuse_own_inputs([folder / part / name for name in shards], own)
        with sole_writer(folder / part):
            _withdraw(folder / part, stem, keep=shards)
            for name, shard in shards.items():
                yield _write(folder / part / name, shard, {"format": "pt", **_metadata(own, latent_space)})
            if len(shards) > 1:
                yield _write_index(folder / part / f"{stem}.safetensors{INDEX}", shards)
            write_json(folder / part / CONFIG, diffusers_config(config))
        yield folder / part / CONFIG


def _withdraw(folder: Path, stem: str, keep: Iterable[str]) -> None:
    """Remove the index and the config, which marks a folder as incomplete, and all shards not in `keep`."""
    leftover = {path for path in folder.glob(f"{stem}*.safetensors") if path.name not in set(keep)}
    for path in (*folder.glob("*.index*.json"), folder / CONFIG, *leftover):
        path.unlink(missing_ok=True)


def _refuse_own_inputs(planned: Iterable[Path], models: list[StoredModel]) -> None:
    """Check that no input would be overwritten: it must still be complete when its second half is read."""
    inputs = {span.path.resolve() for model in models for stored in model.tensors.values() for span in stored.ranges}
    same = [path for path in planned if path.resolve() in inputs]
    if same:
        raise WeightsError(f"{same[0]} is an input of the conversion; name another folder to write into")


def _write(path: Path, tensors: Tensors, metadata: Mapping[str, str]) -> Path:
    if is_written(path, tensors, metadata):
        log.info("%s: already written", path)
    else:
        write_file(path, tensors, metadata)
        log.info("%s: %d tensors written", path, len(tensors))
    return path


def _write_index(path: Path, shards: Mapping[str, Tensors]) -> Path:
    size = sum(stored.nbytes for shard in shards.values() for stored in shard.values())
    names = {name: file for file, shard in shards.items() for name in shard}
    write_json(path, {"metadata": {"total_size": size}, "weight_map": names})
    return path


def _require_complete(part: str, models: list[StoredModel]) -> None:
    """Check that all original files of a part are there: diffusers keeps in one VAE what genmo keeps in two files."""
    found = [file.name for model in models for file in model.files]
    needed = [file.name for file in _layout_of(models[0]).files_of(part)]
    if sorted(found) != sorted(needed):
        raise WeightsError(f"diffusers' {part} is made of {' and '.join(needed)}; found {' and '.join(found)}")


def _metadata(models: list[StoredModel], latent_space: str | None) -> dict[str, str]:
    """Return the metadata to write: that of the sources' files, and the record of the fine-tune."""
    metadata = {key: value for model in models for key, value in model.metadata.items() if key not in _in_metadata()}
    record = {key: value for model in models for key, value in model.record().items() if value is not None}
    if latent_space and record.setdefault("latent_space", latent_space) != latent_space:
        raise WeightsError(f"{models[0].path} has latent space {record['latent_space']!r}, not {latent_space!r}")
    return {**metadata, RECORD: json.dumps(record, sort_keys=True)} if record else metadata


def _statistics(model: StoredModel) -> dict[str, str]:
    """Return the settings that the original files can keep only in their metadata, such as the latents' mean.

    Those that the authors' code has for every such file are left out.
    """
    config, known = model.config(), {}
    names = [name for name in _layout_of(model).in_metadata if name in config]
    metadata = {key: value for key, value in model.metadata.items() if key not in names}
    with suppress(WeightsError):  # only published models show all of their settings
        known = replace(model, metadata=metadata, path=model.path / "no folder").config() if names else {}
    return {name: json.dumps(config[name]) for name in names if config[name] != known.get(name)}


def _has_latent_spaces(model: StoredModel) -> bool:
    """Return whether a model is a transformer that may have been trained in one of several latent spaces."""
    families = [family for family in all_families() if set(model.files) & set(family.layout.files)]
    return any(model.part in family.transformers and len(family.latent_spaces) > 1 for family in families)


def _layout_of(model: StoredModel) -> Layout:
    """Return the original layout that a model's files belong to."""
    return next(family.layout for family in all_families() if model.files[0] in family.layout.files)


def _in_metadata() -> set[str]:
    """Return the settings that any layout keeps in its files' metadata."""
    return {name for family in all_families() for name in family.layout.in_metadata}


def _shards(tensors: Mapping[str, StoredTensor], limit: int, stem: str) -> dict[str, Tensors]:
    """Return file name -> tensors: in their order, as many per file as stay below the limit, at least one."""
    groups: list[Tensors] = [{}]
    size = 0
    for name, stored in tensors.items():
        if groups[-1] and size + stored.nbytes > limit:
            groups.append({})
            size = 0
        groups[-1][name] = stored
        size += stored.nbytes
    if len(groups) == 1:
        return {f"{stem}.safetensors": groups[0]}
    return {f"{stem}-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)}
