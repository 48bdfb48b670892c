"""Read a manifest from its file: YAML, expanded, validated once, every problem on a line of its own."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pusa.errors import ManifestError, PusaError
from pusa.manifest.expansion import SYNTAX, Expansion, expand
from pusa.manifest.models import KINDS, GenerateManifest, Manifest, clash_of
from pusa.system.strict import list_problems
from pusa.system.text import read_text
from pusa.tasks.base import Job, is_id

MAX_BYTES = 4 * 1024 * 1024
MAX_DEPTH = 20
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C where there is one


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping that a file holds.

    Raises:
        ManifestError: it cannot be read, is too large, no YAML, no mapping, or tells something twice.
    """
    text = read_text(path, MAX_BYTES)
    try:
        _refuse_bombs(text, path)
        loader = _Loader(text)
        node = loader.get_single_node()
        _refuse_duplicates(node, path, loader)
        data = loader.construct_document(node) if node is not None else None
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, PusaError):
            raise
        raise ManifestError(f"{path} is not YAML: {error}") from error
    if not isinstance(data, dict):
        held = "nothing" if data is None else type(data).__name__
        raise ManifestError(f"{path} holds {held}; a manifest is a mapping that begins with 'kind:'")
    return data


def _refuse_bombs(text: str, path: Path) -> None:
    """A few lines of aliases can expand to gigabytes (the "billion laughs"), and deep nesting overflows the stack."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        line = event.start_mark.line + 1 if event.start_mark else 0
        if isinstance(event, yaml.AliasEvent):
            raise ManifestError(f"{path}: line {line} uses a YAML alias; manifests may not")
        if depth > MAX_DEPTH:
            raise ManifestError(f"{path}: line {line} is nested more than {MAX_DEPTH} deep")


def _refuse_duplicates(node: Any, path: Path, loader: Any) -> None:
    """YAML lets a later key silently win over an earlier one that means the same (1 and 0x1 do)."""
    if isinstance(node, yaml.MappingNode):
        seen: set[Any] = set()
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise ManifestError(f"{path}: line {line} has a list or a mapping for a key")
            if (constructed := loader.construct_object(key)) in seen:
                raise ManifestError(f"{path}: line {line} gives {key.value!r} a second time")
            seen.add(constructed)
            _refuse_duplicates(value, path, loader)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicates(item, path, loader)


def default_run_dir(manifest: Path) -> Path:
    """runs/<name of the manifest's folder>, under the current folder. A folder of manifests names itself."""
    folder = manifest if manifest.is_dir() else manifest.parent
    return Path("runs", folder.resolve().name)


@dataclass(frozen=True)
class Found:
    """What a file holds: the manifest, of its jobs those that are valid, and a line for each problem."""

    manifest: Manifest | None
    problems: list[str]


def load_manifest(path: Path, run_dir: Path, kind: str | None = None) -> Manifest:
    """Read one manifest.

    Args:
        path: a YAML file; its relative paths are relative to it.
        run_dir: what RUN/ stands for.
        kind: refuse any other kind.

    Raises:
        ManifestError: it cannot be read; every problem found is named, a line each.
    """
    found = find_manifest(path, run_dir, kind)
    if found.manifest is None or found.problems:
        raise ManifestError("\n  ".join([f"{path}:", *found.problems]))
    return found.manifest


def find_manifest(path: Path, run_dir: Path, kind: str | None = None) -> Found:
    """As `load_manifest`, but with the jobs that are valid where others are not.

    Raises:
        ManifestError: it cannot be read at all.
    """
    data = read_mapping(path)
    named = data.get("kind")
    if not isinstance(named, str) or named not in KINDS:
        raise ManifestError(f"{path}: kind is {named!r}; allowed are {', '.join(KINDS)}")
    if kind is not None and named != kind:
        raise ManifestError(f"{path}: kind is {named!r}, but {kind!r} is wanted here")
    return _validate(data, KINDS[named], {"folder": path.parent.absolute(), "run_dir": run_dir.absolute()})


def _validate(data: dict[str, Any], model: type[Manifest], context: dict[str, Path]) -> Found:
    expansion = expand(data, context) if model is GenerateManifest else Expansion(data)
    wrong = expansion.problems
    try:
        manifest = model.model_validate(expansion.data, context={**context, "partial": expansion.partial})
        return Found(_rest(expansion, set(), model, context) if wrong else manifest, wrong)
    except ValidationError as error:
        lines = list_problems(error, model, expansion.as_written, {Job: SYNTAX})
        bad = {item["loc"][1] for item in error.errors() if item["loc"][:1] == ("jobs",) and len(item["loc"]) > 1}
    told = {line.partition(": ")[0] for line in wrong}  # of their values none may be left
    wrong = wrong + [line for line in lines if line.removesuffix(": Field required") not in told]
    if (clash := f"jobs: {clash_of(_ids(expansion))}") not in (*wrong, "jobs: "):
        wrong.append(clash)  # pydantic looks for it only where each job by itself is right
    return Found(_rest(expansion, bad, model, context), [line for line in wrong if not _is_default(line, wrong)])


def _ids(expansion: Expansion) -> list[str]:
    """The ids of the jobs, whatever else is wrong with them. What is no id is told of as such."""
    jobs = expansion.data.get("jobs")
    whole = [job for i, job in enumerate(jobs) if i not in expansion.partial] if isinstance(jobs, list) else []
    ids = [job.get("id") for job in whole if isinstance(job, dict)]
    return [id for id in ids if is_id(id)]


def _rest(expansion: Expansion, bad: set[Any], model: type[Manifest], context: dict[str, Path]) -> Manifest | None:
    """The manifest with the jobs that nothing is wrong with, if there is one."""
    jobs = expansion.data.get("jobs")
    if model is not GenerateManifest or not isinstance(jobs, list):
        return None
    good = [job for i, job in enumerate(jobs) if i not in bad | expansion.partial and isinstance(job, dict)]
    first_of_id = {str(job.get("id")).casefold(): job for job in reversed(good)}
    data = {**expansion.data, "jobs": list(first_of_id.values())[::-1]}
    try:
        return model.model_validate(data, context=context)
    except ValidationError:
        return None


def _is_default(line: str, lines: list[str]) -> bool:
    """Whether a job's problem is that of a default, which is told once."""
    place, _, message = line.partition(": ")
    return place.startswith("jobs.") and f"defaults.{place.rpartition('.')[2]}: {message}" in lines
