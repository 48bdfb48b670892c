"""Choose which jobs of a run are finished. No manifest is named: the run lists its jobs with the rest of its own."""

import difflib
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from pusa.errors import ManifestError
from pusa.generate.ledger import JOBS, WORK, read_list
from pusa.manifest.models import GenerateManifest
from pusa.system.allowed import Allowed
from pusa.system.strict import Strict, list_problems
from pusa.system.text import join_lines, printable, read_text
from pusa.tasks.base import MAX_ID

MAX_LIST = 1 << 24  # bytes of a list: 100,000 ids of 120 characters fit
MAX_WORDS = 1 << 18  # characters of all ids in the command; Prefect takes 512 KiB of parameters
MAX_NEAREST = 5  # unknown ids for which the nearest is looked up, among perhaps 100,000
TEXTS = ("prompt", "negative_prompt")  # which hold no paths


class Chosen(Strict):
    """The jobs to finish: those that are named, those that a file lists, or all."""

    ids: tuple[str, ...] = Field((), description="the ids of jobs")
    file: Path | None = Field(None, description="a file that lists ids, one a line; # begins a comment")
    all: bool = Field(False, description="all jobs")

    def ids_in(self, manifest: GenerateManifest) -> frozenset[str]:
        """Return the ids of the chosen jobs.

        Raises:
            ManifestError: nothing is chosen, an id is not of a job, or the file cannot be read or is not a list.
        """
        if self.all + bool(self.ids) + (self.file is not None) != 1:
            raise ManifestError("name the jobs to finish in one way: by their ids, with --list FILE, or --all")
        if sum(map(len, self.ids)) > MAX_WORDS:
            raise ManifestError(f"{len(self.ids):,} ids are too long for a command; write them to a file for --list")
        known = {job.id: None for job in manifest.jobs}
        if self.all:
            return frozenset(known)
        chosen, where = self.ids, ""
        if self.file is not None:
            Allowed.from_environment().require(self.file)
            chosen, where = _read_ids(self.file), f" in {self.file}"
            if not chosen:
                raise ManifestError(f"{self.file} names no job; expected one id a line")
        if unknown := [id for id in dict.fromkeys(chosen) if id not in known]:
            lines = [_describe(id, known if number < MAX_NEAREST else {}) for number, id in enumerate(unknown)]
            what = "1 id is" if len(unknown) == 1 else f"{len(unknown):,} ids are"
            raise ManifestError(join_lines(f"{what} of no job of this run{where}:", lines))
        return frozenset(chosen)


def _read_ids(path: Path) -> tuple[str, ...]:
    if path.exists() and not path.is_file():  # the opening of a named pipe would wait
        raise ManifestError(f"{path} is not a file; expected a list of ids, one a line")
    lines = (line.partition("#")[0].strip() for line in read_text(path, MAX_LIST).splitlines())
    return tuple(line for line in lines if line)


def _describe(id: str, known: dict[str, None]) -> str:
    near = difflib.get_close_matches(id[:MAX_ID], known, 1)
    return f"'{printable(id)}'{f'; did you mean {near[0]!r}?' if near else ''}"


def manifest_of_run(run_dir: Path) -> GenerateManifest:
    """Return the manifest that was run last in a folder, with absolute paths.

    Raises:
        ManifestError: there is none, one of an earlier version, or one that this version does not accept; or the folder
            leads out of those that the worker allows.
        MediaError: the list of jobs is damaged.
    """
    allowed, run_dir = Allowed.from_environment(), run_dir.absolute()
    allowed.require_tree(run_dir)
    path = run_dir / "videos" / WORK / JOBS
    if not path.is_file():
        raise ManifestError(f"{path} does not exist; expected the folder of a run of `pusa generate`")
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
