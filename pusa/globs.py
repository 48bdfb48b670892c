"""Paths that stand for many files: where a job has them, what they match, and which files go together."""

import glob
import itertools
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from pusa.errors import ManifestError
from pusa.strict import Context, Place, listed, resolve


def is_glob(text: str, context: Context) -> bool:
    """Whether a path is a pattern: it has `*`, `?` or `[`, and there is no file of that very name."""
    return glob.has_magic(text) and "\0" not in text and not os.path.isfile(resolve(Path(text), context))


def matches(text: str, context: Context) -> dict[str, Path]:
    """A glob's files by their stems, sorted.

    Raises:
        ManifestError: there are none, or two of one stem, or one whose name JSON cannot hold.
    """
    escaped = {name: Path(glob.escape(str(folder))) for name, folder in context.items()}
    names = {name for name in glob.iglob(str(resolve(Path(text), escaped)), recursive=True) if os.path.isfile(name)}
    if not names:
        fixed = itertools.takewhile(lambda part: not glob.has_magic(part), Path(text).parts)
        raise ManifestError(f"no file matches {text!r} in {resolve(Path(*fixed), context)}")
    if odd := sorted(name for name in names if name.encode(errors="replace").decode() != name):
        raise ManifestError(f"{text!r} matches names that are not UTF-8: {listed(odd)}")
    paths = sorted(map(Path, names), key=lambda path: (path.stem, path))
    if twice := {str(path): 0 for pair in itertools.pairwise(paths) if pair[0].stem == pair[1].stem for path in pair}:
        raise ManifestError(f"{text!r} matches files that differ only in their folder or ending: {listed(twice)}")
    return {path.stem: path for path in paths}


def pair(found: Mapping[Place, Mapping[str, Path]]) -> list[str]:
    """The stems of globs' files, sorted; the globs have the same.

    Raises:
        ManifestError: some have a file that others lack.
    """
    shared = set.intersection(*(set(files) for files in found.values()))
    alone = {place: [path.name for stem, path in files.items() if stem not in shared] for place, files in found.items()}
    if unpaired := [f"{'.'.join(map(str, place))} {listed(names)}" for place, names in alone.items() if names]:
        raise ManifestError(f"files pair by their names without the ending; unpaired are: {'; '.join(unpaired)}")
    return sorted(shared)


def paths_in(annotation: Any, value: Any, place: Place = ()) -> Iterator[tuple[Place, str]]:
    """Where in `value` the annotation has a path, through models, mappings, lists and unions; and the text there."""
    origin, items = get_origin(annotation), value if isinstance(value, dict) else {}
    if annotation is Path and isinstance(value, str):
        yield place, value
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            if name in items:
                yield from paths_in(field.annotation, items[name], (*place, name))
    elif isinstance(origin, type) and issubclass(origin, Collection):
        held = dict(enumerate(value)) if isinstance(value, list) else items
        for (key, item), inner in itertools.product(held.items(), get_args(annotation)):
            yield from paths_in(inner, item, (*place, key))
    else:
        for inner in get_args(annotation):
            yield from paths_in(inner, value, place)


def put(value: Any, place: Place, new: str) -> Any:
    """A copy of a nested value that has `new` at that place."""
    if not place:
        return new
    items: Any = dict(value) if isinstance(value, dict) else list(value)
    items[place[0]] = put(value[place[0]], place[1:], new)
    return items
