"""The files of one part of a model on this machine: their record, their LoRA, and the fingerprint of their content."""

import functools
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pusa.backbones import all_families
from pusa.errors import WeightsError
from pusa.system.allowed import Allowed
from pusa.system.files import State, digest, read_object, sha256_file, state_of
from pusa.system.text import printable
from pusa.weights.adapters import LoraLayer, lora_files, read_lora
from pusa.weights.stored import read_model
from pusa.weights.tensors import shards_of

BUILTIN = Path(__file__).parent.parent / "builtin"
BASE_KEY = "_pusa_base"
FileState = tuple[Path, State]


@dataclass(frozen=True)
class PartFiles:
    """The files of one part, a folder in diffusers' layout or single files, and perhaps a LoRA to merge into them."""

    part: str
    paths: tuple[Path, ...]
    adapter: Path | None = None

    def __str__(self) -> str:
        return " + ".join(map(str, (*self.paths, *filter(None, [self.adapter]))))

    @property
    def folder(self) -> Path | None:
        """Return the folder, or None if the part lies in single files."""
        return self.paths[0] if self.paths[0].is_dir() else None

    @property
    def base(self) -> "PartFiles":
        """Return the same files without the LoRA."""
        return replace(self, adapter=None)

    def record(self) -> dict[str, Any]:
        """Return the record of the fine-tune: latent_space, backbone, step, recipe; empty if there is none."""
        paths = (*self.paths, *filter(None, [self.adapter]))
        records = [read_model(path).record() for path in paths]
        return {key: value for record in records for key, value in record.items() if value is not None}

    def lora_layers(self) -> dict[str, LoraLayer]:
        """Return the layers of the LoRA by the name of the weight that each changes; empty without a LoRA.

        Raises:
            WeightsError: the LoRA was trained on another transformer or in another latent space, or does not fit.
        """
        if self.adapter is None:
            return {}
        lora = read_lora(self.adapter)
        tensors = {name: t for path in self.paths for name, t in read_model(path).in_diffusers_names().items()}
        layers = lora.layers_by_weight({name: stored.shape for name, stored in tensors.items()})
        self._require_base(self.adapter)
        return layers

    def _require_base(self, adapter: Path) -> None:
        """Check that transformer and latent space are those that the LoRA was trained on, if it records them."""
        base, record = self.base, read_model(adapter).record()
        space, own = base.record().get("latent_space"), record.get("latent_space")
        if space and own and space != own:
            raise WeightsError(f"{adapter} has latent space {own!r}; {base} has {space!r}")
        recipe = record.get("recipe")
        expected = recipe.get("base") if isinstance(recipe, dict) else None
        if expected and expected != (actual := base.fingerprint()):
            names = record.get("base")
            names = names if isinstance(names, dict) else {}
            trained_on = " + ".join(str(names[key]) for key in ("weights", "checkpoint") if key in names)
            trained_on = trained_on or "a transformer"
            raise WeightsError(f"{adapter} was trained on {trained_on} of fingerprint {expected}; {base} has {actual}")

    def files(self) -> list[Path]:
        """Return the files that the part is read from, those of the LoRA too.

        Raises:
            WeightsError: there are none, or a shard is missing.
        """
        own = _files_of(self.folder) if self.folder else [path for path in self.paths if path.is_file()]
        if not own:
            raise WeightsError(f"{self.base} has no files")
        return [*own, *(lora_files(self.adapter) if self.adapter else ())]

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
        """Return the hash of the files' names and hashes, of the LoRA too: 16 hexadecimal digits.

        Raises:
            WeightsError: there are no files, one cannot be read, or one is changed in the meantime.
        """
        if self.adapter:
            both = self.base, PartFiles(self.part, lora_files(self.adapter))
            return digest([files.fingerprint() for files in both])[:16]
        states = self.states()
        try:
            found = _fingerprint(self.folder or self.paths[0].parent, states)
        except OSError as error:
            raise WeightsError(f"{self} cannot be read: {printable(error)}") from error
        if self.states() != states:
            raise WeightsError(f"{self} was changed while it was read; run again")
        return found


def _files_of(folder: Path) -> list[Path]:
    """Return the files that a part is loaded from: no other variants of its weights, and no hidden files."""
    files = sorted(
        path for path in folder.iterdir() if path.is_file() and path.name[0] != "." and ".index." not in path.name
    )
    weights = set(shards_of(folder)) if any(path.suffix == ".safetensors" for path in files) else set()
    return [path for path in files if path.suffix != ".safetensors" or path.name in weights]


def find_part(model: Path, part: str) -> PartFiles:
    """Find a part in a model's folder: a folder of its name, there or in the model's base, or a family's single files.

    The built-in fine-tune has only a transformer; its model_index.json names the base with the other parts.

    Raises:
        WeightsError: the part is missing.
    """
    if (model / part).is_dir():
        return PartFiles(part, (model / part,))
    base = _base_of(model)
    if base and (base / part).is_dir():
        return PartFiles(part, (base / part,))
    single = [[model / file.name for file in family.layout.files_of(part)] for family in all_families()]
    for files in single:
        if files and all(path.is_file() for path in files):
            return PartFiles(part, tuple(files))
    names = " and no ".join([f"{part}/", *(path.name for files in single for path in files)])
    found = ", ".join(sorted(path.name for path in model.iterdir())[:8]) if model.is_dir() else "nothing"
    raise WeightsError(f"{model} has no {names}; found {found}")


def _base_of(model: Path) -> Path | None:
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
