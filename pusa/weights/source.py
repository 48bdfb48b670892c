"""Where one part of a model lies on this machine, what it records of itself, and what names its content."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pusa.errors import WeightsError
from pusa.files import digest, read_json, sha256_file
from pusa.weights.found import read_model
from pusa.weights.genmo import FILES

ENCODERS = ("vae", "text_encoder", "tokenizer")
PARTS = (*ENCODERS, "transformer")
BASE_KEY = "_pusa_base"


@dataclass(frozen=True)
class Source:
    """One part: its folder in diffusers layout, or the single files that hold it."""

    part: str
    paths: tuple[Path, ...]

    def __str__(self) -> str:
        return " + ".join(map(str, self.paths))

    @property
    def folder(self) -> Path | None:
        """The folder, where it is one."""
        return self.paths[0] if self.paths[0].is_dir() else None

    def record(self) -> dict[str, Any]:
        """What a fine-tune says of itself: latent_space, backbone, step, recipe. Empty where nothing is recorded."""
        return {key: value for path in self.paths for key, value in read_model(path).record().items()}

    def fingerprint(self) -> str:
        """What names the content: the hash of its files' hashes.

        Raises:
            WeightsError: there are no files.
        """
        files = [path for path in self.paths if path.is_file()]
        if self.folder:
            files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        if not files:
            raise WeightsError(f"{self} holds no files")
        facts = [(path, path.stat()) for path in files]
        root = self.folder or self.paths[0].parent
        return _fingerprint(root, tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in facts))


def find_part(model: Path, part: str) -> Source:
    """Where a model's folder has a part: a folder of its name, genmo's files, or the base that it borrows from.

    The built-in fine-tune ships its transformer alone; its model_index.json names the base that has the rest.

    Raises:
        WeightsError: it has none.
    """
    if (model / part).is_dir():
        return Source(part, (model / part,))
    base = (read_json(model / "model_index.json") or {}).get(BASE_KEY)
    if base:
        return find_part((model / base).resolve(), part)
    files = [model / file.name for file in FILES if file.part == part]
    if files and all(path.is_file() for path in files):
        return Source(part, tuple(files))
    names = " and no ".join([f"{part}/", *(path.name for path in files)])
    there = ", ".join(sorted(path.name for path in model.iterdir())[:8]) if model.is_dir() else "nothing"
    raise WeightsError(f"{model} has no {names}; it has {there}")


@functools.lru_cache
def _fingerprint(root: Path, files: tuple[tuple[Path, int, int], ...]) -> str:
    return digest([(str(path.relative_to(root)), sha256_file(path)) for path, _, _ in files])[:16]
