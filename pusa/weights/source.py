"""Where one part of a model lies on this machine, what it records of itself, and what names its content."""

import functools
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pusa.backbones import all_families
from pusa.errors import WeightsError
from pusa.system.files import digest, read_json, sha256_file
from pusa.weights.adapters import LoraLayer, lora_files, read_lora
from pusa.weights.stored import read_model
from pusa.weights.tensors import shards_of

BASE_KEY = "_pusa_base"


@dataclass(frozen=True)
class PartFiles:
    """One part: its folder in diffusers layout, or the single files that hold it; and a LoRA that is added to it."""

    part: str
    paths: tuple[Path, ...]
    adapter: Path | None = None

    def __str__(self) -> str:
        return " + ".join(map(str, (*self.paths, *filter(None, [self.adapter]))))

    @property
    def folder(self) -> Path | None:
        """The folder, where it is one."""
        return self.paths[0] if self.paths[0].is_dir() else None

    @property
    def base(self) -> "PartFiles":
        """The same without the LoRA."""
        return replace(self, adapter=None)

    def record(self) -> dict[str, Any]:
        """What a fine-tune says of itself: latent_space, backbone, step, recipe. Empty where nothing is recorded."""
        places = (*self.paths, *filter(None, [self.adapter]))
        records = [read_model(path).record() for path in places]
        return {key: value for record in records for key, value in record.items() if value is not None}

    def lora_layers(self) -> dict[str, LoraLayer]:
        """What the LoRA adds, by the names of the weights that it changes; nothing where there is none.

        Raises:
            WeightsError: it was learnt on another transformer, or in another latent space; or it does not fit.
        """
        if self.adapter is None:
            return {}
        addition = read_lora(self.adapter)
        tensors = {name: t for path in self.paths for name, t in read_model(path).in_diffusers_names().items()}
        layers = addition.by_weight({name: stored.shape for name, stored in tensors.items()})
        self._require_base(self.adapter)
        return layers

    def _require_base(self, adapter: Path) -> None:
        """Refuse to add to another transformer, or in another latent space, than the LoRA records it was learnt on."""
        base, record = self.base, read_model(adapter).record()
        space, own = base.record().get("latent_space"), record.get("latent_space")
        if space and own and space != own:
            raise WeightsError(f"{adapter} has latent space {own!r}; {base} has {space!r}")
        recipe = record.get("recipe")
        wanted = recipe.get("base") if isinstance(recipe, dict) else None
        if wanted and wanted != (there := base.fingerprint()):
            named = record.get("base")
            parts = (
                [str(named[key]) for key in ("weights", "checkpoint") if key in named]
                if isinstance(named, dict)
                else []
            )
            learnt = " + ".join(parts) or "a transformer"
            raise WeightsError(f"{adapter} was learnt on {learnt} of fingerprint {wanted}; {base} has {there}")

    def fingerprint(self) -> str:
        """What names the content: the hash of its files' hashes, a LoRA's included.

        Raises:
            WeightsError: there are no files.
        """
        if self.adapter:
            both = self.base, PartFiles(self.part, lora_files(self.adapter))
            return digest([source.fingerprint() for source in both])[:16]
        files = _files_of(self.folder) if self.folder else [path for path in self.paths if path.is_file()]
        if not files:
            raise WeightsError(f"{self} holds no files")
        facts = [(path, path.stat()) for path in files]
        root = self.folder or self.paths[0].parent
        return _fingerprint(root, tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in facts))


def _files_of(folder: Path) -> list[Path]:
    """What a part is loaded from: not other variants of its weights, nor what others keep in hidden files."""
    files = sorted(
        path for path in folder.iterdir() if path.is_file() and path.name[0] != "." and ".index." not in path.name
    )
    weights = set(shards_of(folder)) if any(path.suffix == ".safetensors" for path in files) else set()
    return [path for path in files if path.suffix != ".safetensors" or path.name in weights]


def find_part(model: Path, part: str) -> PartFiles:
    """Where a model's folder has a part: a folder of its name, genmo's files, or the base that it borrows from.

    The built-in fine-tune ships its transformer alone; its model_index.json names the base that has the rest.

    Raises:
        WeightsError: it has none.
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
    there = ", ".join(sorted(path.name for path in model.iterdir())[:8]) if model.is_dir() else "nothing"
    raise WeightsError(f"{model} has no {names}; it has {there}")


def _base_of(model: Path) -> Path | None:
    """The folder beside it that the model borrows from; nowhere else, whatever a downloaded index may say."""
    index = read_json(model / "model_index.json")
    name = index.get(BASE_KEY) if isinstance(index, dict) else None
    return model.parent / name[3:] if isinstance(name, str) and re.fullmatch(r"\.\./[\w-]+", name) else None


@functools.lru_cache
def _fingerprint(root: Path, files: tuple[tuple[Path, int, int], ...]) -> str:
    return digest([(str(path.relative_to(root)), sha256_file(path)) for path, _, _ in files])[:16]
