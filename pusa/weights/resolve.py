"""From the name of a model to the folder that holds it, and to the fingerprint of its parts."""

import functools
from pathlib import Path

from pusa.errors import WeightsError
from pusa.files import digest, read_json, sha256_file
from pusa.manifest import ModelSpec

BUILTIN = Path(__file__).parent.parent / "builtin"
BASE_KEY = "_pusa_base"


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

    Raises:
        WeightsError: the checkpoint is not there.
    """
    if spec.checkpoint is None:
        return resolve(spec.weights)
    if not (spec.checkpoint / "transformer").is_dir():
        raise WeightsError(f"checkpoint {spec.checkpoint} has no transformer folder; was the fine-tune run?")
    return spec.checkpoint


@functools.cache
def fingerprint(folder: Path) -> str:
    """What names a part's content: the hash of its files' hashes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "README.md")
    if not files:
        raise WeightsError(f"{folder} holds no files")
    return digest([(str(path.relative_to(folder)), sha256_file(path)) for path in files])[:16]
