"""The files of one part of a model on this machine: their record, their LoRAs, and the fingerprint of their content."""

import functools
import json
import re
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pusa.backbones import all_families, all_layouts, misfit
from pusa.backbones.family import Family, Layout
from pusa.errors import WeightsError
from pusa.system.allowed import Allowed
from pusa.system.files import State, digest, read_object, sha256_file, state_of
from pusa.system.text import preview, printable
from pusa.weights.adapters import Addition, lora_files, read_lora
from pusa.weights.stored import CONFIG, is_original, models_in, read_model
from pusa.weights.tensors import INDEX, shards_named_in, shards_of

BUILTIN = Path(__file__).parent.parent / "builtin"
MAX_FACTS, MAX_FACT, MAX_DEPTH = 100, 1 << 14, 16  # of a record in a lineage: keys; characters and depth of a value
BASE_KEY = "_pusa_base"
FileState = tuple[Path, State]


@dataclass(frozen=True)
class Adapter:
    """The file of a LoRA, what it is multiplied by, and the expert that a manifest names it for, if any."""

    path: Path
    strength: float = 1.0
    expert: str | None = None

    def __str__(self) -> str:
        return str(self.path) if self.strength == 1 else f"{self.strength:g} * {self.path}"

    def record(self) -> dict[str, Any]:
        """Return the record of the fine-tune; empty if there is none."""
        return read_model(self.path).record()

    def key(self) -> tuple[str, float]:
        """Return the hash of the files' names and hashes, and the strength: what decides the result.

        Raises:
            WeightsError: a file cannot be read, or is changed in the meantime.
        """
        try:
            states = self._states()
            found = _fingerprint(self.path.parent, states)
            if self._states() != states:
                raise WeightsError(f"{self.path} was changed while it was read; run again")
        except OSError as error:
            raise WeightsError(f"{self.path} cannot be read: {printable(error)}") from error
        return found, self.strength

    def _states(self) -> tuple[FileState, ...]:
        return tuple((file, state_of(file)) for file in lora_files(self.path))

    def require_expert(self) -> None:
        """Check that the LoRA is for the expert that it was trained on, if it records it.

        Raises:
            WeightsError: it is not.
        """
        if self.expert and (own := self.record().get("expert")) and own != self.expert:
            raise WeightsError(
                f"{self.path} was trained on expert {own!r}, and is named with expert {self.expert!r}; name it with "
                f"expert {own}"
            )


@dataclass(frozen=True)
class PartFiles:
    """The files of one part, a folder in diffusers' layout or single files, and perhaps LoRAs to merge into them."""

    part: str
    paths: tuple[Path, ...]
    adapters: tuple[Adapter, ...] = ()

    def __str__(self) -> str:
        return " + ".join(map(str, (*self.paths, *self.adapters)))

    @property
    def folder(self) -> Path | None:
        """Return the folder, or None if the part lies in single files."""
        return self.paths[0] if self.paths[0].is_dir() else None

    @property
    def base(self) -> "PartFiles":
        """Return the same files without LoRAs."""
        return replace(self, adapters=())

    def record(self) -> dict[str, Any]:
        """Return the record of the fine-tune: latent_space, backbone, step, recipe; empty if there is none."""
        paths = (*self.paths, *(adapter.path for adapter in self.adapters))
        records = [read_model(path).record() for path in paths]
        return {key: value for record in records for key, value in record.items() if value is not None}

    def lineage(self) -> list[dict[str, Any]]:
        """Return the paths of the files and LoRAs, with their strengths and records, for the record of a result.

        What is too large is left out of a record by name, since anybody may have written it.
        """
        found: list[dict[str, Any]] = [{"path": str(path), "record": read_model(path).record()} for path in self.paths]
        for adapter in self.adapters:
            found.append({"path": str(adapter.path), "strength": adapter.strength, "record": adapter.record()})
        for source in found:
            small = {key: value for key, value in source["record"].items() if _is_small(value)}
            small = dict([*small.items()][:MAX_FACTS])
            left_out = sorted(source["record"].keys() - small.keys())[:MAX_FACTS]
            source["record"] = small | ({"left_out": [preview(key) for key in left_out]} if left_out else {})
        return [{key: value for key, value in source.items() if value != {}} for source in found]

    def additions(self) -> dict[str, list[tuple[float, Addition]]]:
        """Return what the LoRAs add to each weight, with the strength of each; empty without a LoRA.

        Raises:
            WeightsError: a LoRA was trained on another transformer or in another latent space, or does not fit.
        """
        found: dict[str, list[tuple[float, Addition]]] = defaultdict(list)
        if not self.adapters:
            return found
        tensors = {name: t for path in self.paths for name, t in read_model(path).in_diffusers_names().items()}
        shapes = {name: stored.shape for name, stored in tensors.items()}
        for adapter in self.adapters:
            lora = read_lora(adapter.path)
            lora.require_fit(shapes)
            self._require_base(adapter)
            for name, updates in lora.additions.items():
                found[name] += [(adapter.strength, update) for update in updates]
        return found

    def in_fixed_order(self) -> "PartFiles":
        """Return the same files with the LoRAs in an order of their contents: so the last bit of sums is decided."""
        if len(self.adapters) < 2:
            return self
        return replace(self, adapters=tuple(sorted(self.adapters, key=Adapter.key)))

    def _require_base(self, adapter: Adapter) -> None:
        """Check that transformer and latent space are those that the LoRA was trained on, if it records them."""
        adapter.require_expert()
        record = adapter.record()
        others = [(self.base, self.base.record()), *((other, other.record()) for other in self.adapters)]
        for other, theirs in others:
            for key in ("latent_space", "backbone"):
                known, own = theirs.get(key), record.get(key)
                if known and own and known != own:
                    raise WeightsError(f"{adapter.path} has {key.replace('_', ' ')} {own!r}; {other} has {known!r}")
        recipe = record.get("recipe")
        expected = recipe.get("base") if isinstance(recipe, dict) else None
        if expected and expected != (actual := self.base.fingerprint()):
            names = record.get("base")
            names = names if isinstance(names, dict) else {}
            trained_on = " + ".join(str(names[key]) for key in ("weights", "checkpoint") if key in names)
            trained_on = trained_on or "a transformer"
            raise WeightsError(
                f"{adapter.path} was trained on {trained_on} of fingerprint {expected}; {self.base} has {actual}"
            )

    def files(self) -> list[Path]:
        """Return the files that the part is read from, those of the LoRAs too.

        Raises:
            WeightsError: there are none, or a shard is missing.
        """
        own = _files_of(self.folder) if self.folder else self._single_files()
        if not own:
            raise WeightsError(f"{self.base} has no files")
        return [*own, *(file for adapter in self.adapters for file in lora_files(adapter.path))]

    def _single_files(self) -> list[Path]:
        """Return the files of a part outside a folder of its own: those of an index, and the authors' config.json."""
        paths = [path for path in self.paths if path.is_file()]
        files = []
        for path in paths:
            files += [path.parent / name for name in shards_named_in(path)] if path.name.endswith(INDEX) else [path]
        has_config = any(file.original_class for layout in all_layouts() for file in layout.files_of(self.part))
        configs = {path.parent / CONFIG for path in paths if has_config and is_original(path.parent)}
        return [*files, *sorted(configs)]

    def states(self) -> tuple[FileState, ...]:
        """Return the files with their states, which differ if one is changed or replaced.

        Raises:
            WeightsError: there are no files, or one cannot be read.
        """
        try:
            return tuple((path, state_of(path)) for path in self.files())
        except OSError as error:
            raise WeightsError(f"{self} cannot be read: {printable(error)}") from error

    def fingerprint(self) -> str:
        """Return the hash of the files' names and hashes, of the LoRAs too, with strengths: 16 hexadecimal digits.

        Raises:
            WeightsError: there are no files, one cannot be read, or one is changed in the meantime.
        """
        if self.adapters:
            first, *others = loras = sorted(map(Adapter.key, self.adapters))
            alone = not others and first[1] == 1  # hashed as when there was one LoRA without a strength
            return digest([self.base.fingerprint(), *(first[:1] if alone else loras)])[:16]
        states = self.states()
        try:
            found = _fingerprint(self.folder or self.paths[0].parent, states)
        except OSError as error:
            raise WeightsError(f"{self} cannot be read: {printable(error)}") from error
        if self.states() != states:
            raise WeightsError(f"{self} was changed while it was read; run again")
        return found


def _is_small(value: Any, depth: int = MAX_DEPTH) -> bool:
    """Return whether a JSON value is neither long nor nested deep."""
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        if not depth or not all(_is_small(one, depth - 1) for one in inner):
            return False
    return depth < MAX_DEPTH or len(json.dumps(value)) <= MAX_FACT


def _files_of(folder: Path) -> list[Path]:
    """Return the files that a part is loaded from: no other variants of its weights, and no hidden files."""
    files = sorted(
        path for path in folder.iterdir() if path.is_file() and path.name[0] != "." and ".index." not in path.name
    )
    weights = set(shards_of(folder)) if any(path.suffix == ".safetensors" for path in files) else set()
    return [path for path in files if path.suffix != ".safetensors" or path.name in weights]


def find_part(model: Path, part: str, family: Family | None = None) -> PartFiles:
    """Find a part in a model's folder.

    It is a folder of the part's name, there or in the model's base; else the files of a family's original layout; else
    safetensors files of any name, recognised by their tensors. The built-in fine-tune has only a transformer; its
    model_index.json names the base with the other parts.

    Args:
        model: the folder.
        part: the name of the part, as diffusers names its folder.
        family: the family that the model must be of; default: any.

    Raises:
        WeightsError: the part is missing, there twice or a pickle, or the model is not of the family.
    """
    names = sorted(path.name for path in model.iterdir()) if model.is_dir() else []
    if family and (reason := misfit(family, part, names)):
        raise WeightsError(f"{model} is not a {family.name}: {reason}")
    base = base_of(model)
    for folder in (model, *((base,) if base else ())):
        if (folder / part).is_dir():
            return PartFiles(part, (folder / part,))
    layouts = [family.layout] if family else all_layouts()
    for layout in layouts:
        if paths := _published(model, part, layout) or _recognised(model, part, layout):
            return PartFiles(part, paths)
    for layout in layouts:
        pickles = [file.pickle for file in layout.files_of(part) if file.pickle and (model / file.pickle).is_file()]
        if advice := layout.pickle_advice(part, pickles):
            raise WeightsError(f"{model} has no {part} that can be used: {advice}")
    expected = " and no ".join(
        [f"{part}/", *dict.fromkeys(name for layout in layouts for name in layout.places_of(part))]
    )
    shown = [name for name in names if name[0] != "."]
    raise WeightsError(f"{model} has no {expected}; found {', '.join(shown[:8]) or 'nothing'}{_advice(model, part)}")


def _advice(model: Path, part: str) -> str:
    """Return what to do about a part that is missing; "" where its name says enough."""
    if any(part in family.tokenizers for family in all_families()):
        return f"; copy the folder {part} of the published model there, or name a model that has it as `text_encoder:`"
    inner = [path for path in sorted(model.glob("*/*.safetensors")) if not (path.parent / CONFIG).exists()]
    if inner:
        name = printable(inner[0].relative_to(model))
        return f"; files in its folders, such as {name}, are not searched: put those of one model into one folder"
    return ""


def _published(model: Path, part: str, layout: Layout) -> tuple[Path, ...]:
    """Return the files of a part where a family's authors publish them; an index stands for its shards."""
    if (folder := layout.folders.get(part)) and (model / folder).is_dir():
        return (model / folder,)
    paths: list[Path] = []
    for file in layout.files_of(part):
        there = [path for path in (model / file.name, model / f"{file.name}{INDEX}") if path.is_file()]
        if len(there) > 1:
            raise WeightsError(f"{there[0]} and {there[1]} both hold the {part}; remove one of them")
        if not there:
            return ()
        paths += there
    return tuple(paths)


def _recognised(model: Path, part: str, layout: Layout) -> tuple[Path, ...]:
    """Return the files of a part among those in a folder, whatever their names."""
    needed = layout.files_of(part)
    stored = [read_model(path) for path in models_in(model)] if needed and model.is_dir() else []
    found = [known for known in stored if set(known.files) & set(needed)]
    for file in needed:
        same = [known.path.name for known in found if file in known.files]
        if not same:
            return ()
        if len(same) > 1:
            raise WeightsError(f"{model} has the {part} twice, in {' and '.join(same)}; keep one of them there")
    return tuple(with_settings(known.path) for known in found)


def with_settings(file: Path) -> Path:
    """Return the folder of a file that is a part in diffusers' layout, with its config.json; any other file unchanged.

    Not all settings show in the shapes: not the number of heads, not the statistics of a VAE's latents.
    """
    folder = file.parent
    is_part = (folder / CONFIG).is_file() and not is_original(folder) and models_in(folder) == [file]
    return folder if is_part and read_model(folder).layout == "diffusers" else file


def base_of(model: Path) -> Path | None:
    """Return the model's base, a folder beside it. A downloaded index cannot lead anywhere else.

    Raises:
        ManifestError: it, or a link in it, leads out of the folders that the worker allows.
    """
    name = read_object(model / "model_index.json").get(BASE_KEY)
    if not (isinstance(name, str) and re.fullmatch(r"\.\./[\w-]+", name)):
        return None
    base = model.parent / name[3:]
    if base.parent != BUILTIN:
        Allowed.from_environment().require_tree(base)
    return base


@functools.lru_cache
def _fingerprint(root: Path, states: tuple[FileState, ...]) -> str:
    return digest([(str(path.relative_to(root)), sha256_file(path)) for path, _ in states])[:16]
