"""From the name of a model to the folder that holds it, and to the fingerprint of its parts."""

import functools
from pathlib import Path

from pusa.errors import WeightsError
from pusa.files import digest, read_json, sha256_file
from pusa.manifest import ModelSpec

BUILTIN = Path(__file__).parent.parent / "builtin"
BASE_KEY = "_pusa_base"
LATENT_SPACE = "dit"  # the one space that fine-tunes are made and used in


def resolve(weights: str) -> Path:
    """The folder, in diffusers layout, that `weights` names: "builtin:NAME" or a path.

    Raises:
        WeightsError: there is no such model.
    """
    kind, _, name = weights.partition(":")
    if kind == "builtin":
        known = sorted(path.parent.name for path in BUILTIN.glob("*/model_index.json"))
        if name not in known:
            raise WeightsError(
                f"unknown built-in model {weights!r}; allowed are {', '.join(f'builtin:{n}' for n in known)}"
            )
        return BUILTIN / name
    folder = Path(weights)
    if not folder.is_dir():
        raise WeightsError(
            f"weights {weights!r} are no folder; allowed are builtin:NAME or a folder in diffusers layout"
        )
    return folder


def part_folder(model: Path, part: str) -> Path:
    """The model folder that has `part`: this one, or the base beside it that its model_index.json names.

    The built-in fine-tune ships its transformer alone and borrows the rest.
    """
    base = (read_json(model / "model_index.json") or {}).get(BASE_KEY)
    return (model / base).resolve() if base and not (model / part).is_dir() else model


def transformer_folder(spec: ModelSpec) -> Path:
    """The folder whose `transformer` a model spec means: its checkpoint's, else its weights' own.

    `last` is followed here, once: the step it points to never changes, while `last` may move on during a run.

    Raises:
        WeightsError: the checkpoint is not there, or is of another backbone or latent space.
    """
    if spec.checkpoint is None:
        return resolve(spec.weights)
    folder = spec.checkpoint.resolve()
    if not (folder / "transformer").is_dir():
        raise WeightsError(f"checkpoint {spec.checkpoint} has no transformer folder; was the fine-tune run?")
    recipe = (read_json(folder / "checkpoint.json") or {}).get("recipe", {})
    for name, wanted in (("backbone", spec.backbone), ("latent_space", LATENT_SPACE)):
        if recipe.get(name, wanted) != wanted:
            raise WeightsError(f"checkpoint {spec.checkpoint} has {name} {recipe[name]!r}; wanted is {wanted!r}")
    return folder


def fingerprint(folder: Path) -> str:
    """What names a part's content: the hash of its files' hashes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        raise WeightsError(f"{folder} holds no files")
    facts = [(path, path.stat()) for path in files]
    return _fingerprint(folder, tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in facts))


@functools.lru_cache
def _fingerprint(folder: Path, files: tuple[tuple[Path, int, int], ...]) -> str:
    return digest([(str(path.relative_to(folder)), sha256_file(path)) for path, _, _ in files])[:16]
