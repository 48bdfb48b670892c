"""Read a manifest from its file: parse the YAML, expand the jobs, validate once, and report each problem on a line."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pusa.errors import ManifestError
from pusa.manifest.expansion import MAX_JOBS, SYNTAX, Expansion, expand
from pusa.manifest.models import KINDS, GenerateManifest, Manifest, describe_repeated_ids
from pusa.manifest.parsing import parse_yaml
from pusa.system.allowed import Allowed
from pusa.system.strict import list_problems
from pusa.system.text import join_lines, printable, read_text
from pusa.tasks.base import Job, is_id

MAX_NAMED = 8  # manifests of a folder that an error names
MAX_BYTES = 16 * 1024 * 1024  # of a file: 10,000 jobs, each with a prompt of 1,500 characters


@dataclass(frozen=True)
class ReadManifest:
    """The content of a file: the manifest with the valid jobs, None if nothing is usable, and a line per problem."""

    manifest: Manifest | None
    problems: list[str]


def default_run_dir(manifest: Path) -> Path:
    """Return runs/<name of the manifest's folder> under the current folder; for a folder of manifests its own name."""
    folder = manifest if manifest.is_dir() else manifest.parent
    return Path("runs", folder.resolve().name)


def load_manifest(path: Path, run_dir: Path, kind: str | None = None, sha256: str | None = None) -> Manifest:
    """Read one manifest that has no problems.

    Args:
        path: a YAML file; its relative paths are relative to it.
        run_dir: the folder that RUN/ stands for.
        kind: the only kind that is accepted.
        sha256: the hash that the file's bytes must have.

    Raises:
        ManifestError: the file cannot be read or was changed; or names every problem, each on a line.
    """
    read = read_manifest(path, run_dir, kind, sha256)
    if read.manifest is None or read.problems:
        raise ManifestError(join_lines(f"{path}:", read.problems))
    return read.manifest


def read_manifest(path: Path, run_dir: Path, kind: str | None = None, sha256: str | None = None) -> ReadManifest:
    """Read one manifest as `load_manifest` does, but keep the valid jobs where others have problems.

    Raises:
        ManifestError: the file cannot be read at all, was changed, or has another kind; or it or the run's folder leads
            out of the folders that the worker allows.
    """
    allowed = Allowed.from_environment()
    allowed.require(path)
    allowed.require_tree(run_dir)
    return _read(read_mapping(path, sha256), str(path), path.parent, run_dir, kind, allowed)


def check_mapping(data: Mapping[str, Any], run_dir: Path) -> Manifest:
    """Return the manifest of a mapping as a file holds it. Relative paths are relative to the current folder.

    Raises:
        ManifestError: as `load_manifest`.
    """
    allowed = Allowed.from_environment()
    allowed.require_tree(run_dir)
    read = _read(dict(data), "the manifest", Path.cwd(), run_dir, None, allowed)
    if read.manifest is None or read.problems:
        raise ManifestError(join_lines("the manifest:", read.problems))
    return read.manifest


def _read(
    data: dict[str, Any], name: str, folder: Path, run_dir: Path, kind: str | None, allowed: Allowed
) -> ReadManifest:
    actual = data.get("kind")
    if not isinstance(actual, str) or actual not in KINDS:
        raise ManifestError(f"{name}: kind is {actual!r}; allowed are {', '.join(KINDS)}")
    if kind is not None and actual != kind:
        raise ManifestError(f"{name}: kind is {actual!r}; expected {kind!r}")
    if isinstance(jobs := data.get("jobs"), list) and len(jobs) > MAX_JOBS:
        raise ManifestError(f"{name}: jobs has {len(jobs):,} entries; allowed are {MAX_JOBS:,}")
    context = {"folder": folder.absolute(), "run_dir": run_dir.absolute(), "allowed": allowed}
    return _validate(data, KINDS[actual], context)


def read_mapping(path: Path, sha256: str | None = None) -> dict[str, Any]:
    """Read a YAML file that holds a mapping, with limits on its size and depth, and no key twice.

    Raises:
        ManifestError: the file cannot be read, has another hash than `sha256`, is too large or too deep, not YAML, not
            a mapping, or repeats a key.
    """
    if path.is_dir():
        names = sorted(printable(file.name) for file in path.glob("*.yaml"))[:MAX_NAMED]
        which = f", such as {', '.join(names)}" if names else "; it has no .yaml file"
        raise ManifestError(f"{path} is a folder; name a manifest in it{which}")
    data = parse_yaml(read_text(path, MAX_BYTES, sha256), str(path))
    if not isinstance(data, dict):
        content = "nothing" if data is None else type(data).__name__
        raise ManifestError(f"{path} holds {content}; expected a mapping that begins with 'kind:'")
    return data


def _validate(data: dict[str, Any], model: type[Manifest], context: Mapping[str, Any]) -> ReadManifest:
    """Expand the jobs and validate; where some jobs are invalid, validate once more with the others alone."""
    expansion = expand(data, context) if model is GenerateManifest else Expansion(data)
    lines = expansion.problems
    if not expansion.partial:  # else the ids of some jobs are not known, and none that is named can be refused
        context = {**context, "ids": dict.fromkeys(_complete_ids(expansion))}
    try:
        manifest = model.model_validate(expansion.data, context={**context, "partial": expansion.partial})
        return ReadManifest(_valid_part(expansion, set(), model, context) if lines else manifest, lines)
    except ValidationError as error:
        invalid = list_problems(error, model, expansion.as_written, {Job: SYNTAX})
        bad = {item["loc"][1] for item in error.errors() if item["loc"][:1] == ("jobs",) and len(item["loc"]) > 1}
    reported = {line.partition(": ")[0] for line in lines}  # where expansion failed, a key may be missing because of it
    lines = lines + [line for line in invalid if line.removesuffix(": Field required") not in reported]
    if (repeated := f"jobs: {describe_repeated_ids(_complete_ids(expansion))}") not in (*lines, "jobs: "):
        lines.append(repeated)  # pydantic checks this only if every job is valid by itself
    # A bad default is a problem of each job that gets it: report it once.
    all_lines = set(lines)
    lines = [line for line in lines if not _repeats_default(line, all_lines)]
    return ReadManifest(_valid_part(expansion, bad, model, context), lines)


def _complete_ids(expansion: Expansion) -> list[str]:
    """Return the valid ids of the jobs, whatever else is wrong with the jobs."""
    jobs = expansion.data.get("jobs")
    complete = [job for i, job in enumerate(jobs) if i not in expansion.partial] if isinstance(jobs, list) else []
    ids = [job.get("id") for job in complete if isinstance(job, dict)]
    return [id for id in ids if is_id(id)]


def _valid_part(
    expansion: Expansion, bad: set[Any], model: type[Manifest], context: Mapping[str, Any]
) -> Manifest | None:
    """Return the manifest with the valid jobs alone, if there are any."""
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


def _repeats_default(line: str, lines: set[str]) -> bool:
    """Return whether a job's problem is also reported for `defaults`."""
    place, _, message = line.partition(": ")
    return place.startswith("jobs.") and f"defaults.{place.rpartition('.')[2]}: {message}" in lines
