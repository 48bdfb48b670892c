"""Choose which jobs of a run are finished: by their ids, by a list of ids in a file, or all."""

import difflib
from pathlib import Path

from pydantic import Field

from pusa.errors import ManifestError
from pusa.manifest.models import GenerateManifest
from pusa.system.allowed import Allowed
from pusa.system.strict import Strict
from pusa.system.text import join_lines, printable, read_text, shown_path
from pusa.tasks.base import MAX_ID

MAX_LIST = 1 << 24  # bytes of a list: 100,000 ids of 120 characters fit
MAX_WORDS = 1 << 18  # characters of all ids in the command; Prefect takes 512 KiB of parameters
MAX_NEAREST = 5  # unknown ids for which the nearest is looked up, among perhaps 100,000


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
        chosen, where = self.ids, "the command"
        if self.file is not None:
            Allowed.from_environment().require(self.file)
            chosen, where = _read_ids(self.file), shown_path(self.file)
            if not chosen:
                raise ManifestError(f"{self.file} names no job; expected one id a line")
        if unknown := [id for id in dict.fromkeys(chosen) if id not in known]:
            lines = [_describe(id, known if number < MAX_NEAREST else {}) for number, id in enumerate(unknown)]
            if len(lines) == 1:
                raise ManifestError(f"{where} names 1 job that this run does not have: {lines[0]}")
            raise ManifestError(join_lines(f"{where} names {len(lines):,} jobs that this run does not have:", lines))
        return frozenset(chosen)


def _read_ids(path: Path) -> tuple[str, ...]:
    if path.exists() and not path.is_file():  # the opening of a named pipe would wait
        raise ManifestError(f"{path} is not a file; expected a list of ids, one a line")
    lines = (line.partition("#")[0].strip() for line in read_text(path, MAX_LIST).splitlines())
    return tuple(line for line in lines if line)


def _describe(id: str, known: dict[str, None]) -> str:
    near = difflib.get_close_matches(id[:MAX_ID], known, 1)
    return f"'{printable(id)}'{f'; did you mean {near[0]!r}?' if near else ''}"
