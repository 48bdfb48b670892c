"""Keep `jobs.json`: the jobs and the rest of the manifest that was started last in the folder of a run.

`pusa status`, `pusa finish` and the gallery read it. So do commands that were started earlier: they leave to that
manifest the jobs that it changes.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pusa.errors import ManifestError, MediaError
from pusa.generate.ledger import LATER, WORK, Keys, Ledger, reading, settings_of
from pusa.generate.outputs import RECORD, paths_in, with_paths_changed
from pusa.manifest.models import GenerateManifest
from pusa.system.allowed import Allowed
from pusa.system.files import GONE, own_digest, read_object, stamp_of, write_json
from pusa.system.strict import list_problems
from pusa.system.text import join_lines, shown_path
from pusa.tasks.base import Job, is_id

JOBS = "jobs.json"  # in `.work/`
JOBS_VERSION = 1
NO_KEYS = {"key": None, "latents_key": None}
TEXTS = ("prompt", "negative_prompt")  # which hold no paths


@dataclass(frozen=True)
class ListedJob:
    """A job of the manifest that was run last. Its keys are None if it read what another job had yet to write."""

    id: str
    settings: Mapping[str, Any]
    key: str | None
    latents_key: str | None


def list_jobs(ledger: Ledger, keys: Mapping[str, Keys], manifest: GenerateManifest, again: bool = False) -> None:
    """Write `jobs.json`: all jobs of a manifest with their keys, the weights, and the rest of the manifest.

    With `again`, by `pusa finish`, it is the manifest that is listed already, and keeps the place that is listed:
    another one holds for that command alone.
    """
    rows = []
    for job in manifest.jobs:
        known = {"key": keys[job.id].video, "latents_key": keys[job.id].latents} if job.id in keys else NO_KEYS
        rows.append({"id": job.id, **known, "settings": settings_of(job)})
    # A URL may have a secret in its path, so whom it notifies is kept only where a variable names it.
    rest = manifest.model_dump(exclude={"jobs", "defaults"})
    rest |= {key: [a for a in rest[key] if a.startswith("env:")] for key in ("on_end", "on_failure")}
    if again and ledger.work(JOBS).exists():
        rest["place"] = read_list(ledger.folder).get("manifest", rest)["place"]
    about = {"run_dir": str(ledger.folder.parent.absolute()), "manifest": with_paths_changed(rest, str)}
    # A key counts a default of 24 as another value than 24.0, so what is a default must stay one.
    about["unset"] = {job.id: sorted(type(job).model_fields.keys() - job.model_fields_set) for job in manifest.jobs}
    facts = {"weights": dict(ledger.fingerprints), "min_free_gib": manifest.min_free_gib, **about}
    content = {"version": JOBS_VERSION, **facts, "jobs": rows}
    write_json(ledger.work(JOBS), {**content, "sha256": own_digest(content)})


def read_list(folder: Path) -> dict[str, Any]:
    """Return what `list_jobs` wrote.

    Raises:
        MediaError: there is no list, or it is damaged.
    """
    path = folder / WORK / JOBS
    with reading(path):
        content = read_object(path)
    if content.get("version") != JOBS_VERSION or content.get("sha256") != own_digest(content):
        raise MediaError(f"{path} is missing or damaged; run the manifest again, which writes it first")
    return content


def require_list(run_dir: Path) -> None:
    """Raise ManifestError if there is no list of jobs in the folder of a run."""
    path = run_dir / "videos" / WORK / JOBS
    if not path.is_file():
        why = f"`pusa generate` writes {path.relative_to(run_dir)} there" if run_dir.is_dir() else "it does not exist"
        raise ManifestError(f"{shown_path(run_dir)} is not the folder of a generate run: {why}")


def listed_jobs(folder: Path) -> tuple[list[ListedJob], dict[str, str]]:
    """Return the jobs of the manifest that was run last, and the fingerprints of its weights. Errors: `read_list`."""
    content = read_list(folder)
    jobs = [ListedJob(**{**row, "settings": {**LATER, **row["settings"]}}) for row in content["jobs"]]
    return jobs, content["weights"]


def shown_ids(run_dir: Path) -> list[str]:
    """Return the ids of a run's jobs, in order: those of the manifest that was run last.

    Calls from Python list no jobs: in a folder with these alone, all that have a record, as they were made.

    Raises:
        ManifestError: there are none, or the list names something else.
        MediaError: the list is damaged.
    """
    folder = run_dir / "videos"
    path = folder / WORK / JOBS
    if path.is_file():
        ids = [job.id for job in listed_jobs(folder)[0]]
        if wrong := [id for id in ids if not is_id(id)]:
            raise ManifestError(f"{path} has {wrong[0]!r:.140}, which is not the id of a job")
    else:
        ids = _recorded_ids(folder)
    if not ids:
        raise ManifestError(f"{run_dir} has no jobs: {path} does not exist; expected the folder of a generate run")
    return ids


def _recorded_ids(folder: Path) -> list[str]:
    """Return the ids of the jobs that have a record, in the order in which these were written."""
    written = {}
    for path in folder.glob(f"*{RECORD}"):
        with suppress(OSError):  # it was removed meanwhile
            written[path.name.removesuffix(RECORD)] = path.lstat().st_mtime_ns
    return sorted(filter(is_id, written), key=lambda id: (written[id], id))


class NewestList:
    """The list of jobs as it is now, and so what the manifest that was started last makes of a job."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._read_at = folder, GONE
        self._jobs: dict[str, ListedJob] = {}

    def changes(self, job: Job, keys: Keys) -> bool:
        """Return whether another video is made of a job, so that the one with these keys would be replaced."""
        from pusa.generate.canonical import NOT_OF_THE_VIDEO

        listed = self._read().get(job.id)
        if listed is None:
            return False
        if listed.key:
            return listed.key != keys.video
        # A file may have another path on another machine.
        fixed = {key for key, value in job.model_dump().items() if not any(paths_in(value))} - NOT_OF_THE_VIDEO
        return any(listed.settings.get(key) != value for key, value in settings_of(job).items() if key in fixed)

    def _read(self) -> dict[str, ListedJob]:
        """Return the jobs by id; none if the list is damaged."""
        if (stamp := stamp_of(self._folder / WORK / JOBS)) != self._read_at:
            try:
                self._jobs = {listed.id: listed for listed in listed_jobs(self._folder)[0]}
            except MediaError:
                self._jobs = {}
            self._read_at = stamp
        return self._jobs


def manifest_of_run(run_dir: Path) -> GenerateManifest:
    """Return the manifest that was run last in a folder, with absolute paths.

    Raises:
        ManifestError: there is none, one of an earlier version, or one that this version does not accept; or the folder
            leads out of those that the worker allows.
        MediaError: the list of jobs is damaged.
    """
    allowed, run_dir = Allowed.from_environment(), run_dir.absolute()
    allowed.require_tree(run_dir)
    require_list(run_dir)
    path = run_dir / "videos" / WORK / JOBS
    content = read_list(run_dir / "videos")
    if "manifest" not in content:
        raise ManifestError(f"{path} is of an earlier version; run `pusa generate MANIFEST` once more, then finish")
    jobs = []
    for row in content["jobs"]:
        unset = content["unset"][row["id"]]
        jobs.append({key: value for key, value in row["settings"].items() if key not in unset})
    data = {**content["manifest"], "jobs": jobs}
    if (before := content["run_dir"]) != str(run_dir):
        data = _moved(data, before, str(run_dir))
    context = {"run_dir": run_dir, "folder": run_dir, "allowed": allowed}
    context["ids"] = {row["id"]: None for row in content["jobs"]}
    try:
        return GenerateManifest.model_validate(data, context=context)
    except ValidationError as error:
        raise ManifestError(join_lines(f"{path}:", list_problems(error, GenerateManifest))) from error


def _moved(value: Any, before: str, now: str) -> Any:
    """Return settings with the paths in a run's folder as they are since it was moved, or on this machine."""
    if isinstance(value, dict):
        return {key: inner if key in TEXTS else _moved(inner, before, now) for key, inner in value.items()}
    if isinstance(value, list):
        return [_moved(inner, before, now) for inner in value]
    is_inside = isinstance(value, str) and value.startswith(f"{before}/")
    return f"{now}{value.removeprefix(before)}" if is_inside else value
