"""Find the jobs of a manifest that read what other jobs of it write, and put the jobs in order."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from graphlib import CycleError, TopologicalSorter
from heapq import heappop, heappush
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pusa.backbones.family import Geometry
from pusa.errors import ConditionError
from pusa.tasks.base import VIDEO_SUFFIX, Job
from pusa.video.formats import CLIPS, FORMATS

if TYPE_CHECKING:
    from pusa.generate.latents import LatentsHeader

VIDEO, LATENTS, RECORD = VIDEO_SUFFIX, ".latents.safetensors", ".json"  # after a job's id
PREVIEWS, PREVIEW = "previews", ".jpg"  # the folder of one small picture of each job, and what follows the job's id


class Outputs:
    """The files that jobs write into a folder; without a folder, none.

    Args:
        folder: the folder.
        jobs: the jobs.
        space_name: the latent space of their model; None if it is unknown.
    """

    def __init__(self, folder: Path | None = None, jobs: Sequence[Job] = (), space_name: str | None = None) -> None:
        self._folder, self._jobs, self._space_name = folder, jobs, space_name
        self._writers: dict[str, Job] = {}
        self._found: dict[Path, Job | None] = {}
        if folder is not None:
            real = os.path.realpath(folder)
            self._writers = {
                os.path.join(real, job.id + end): job
                for job in jobs
                for end in (VIDEO, LATENTS, *(FORMATS[name].end for name in CLIPS if name in job.formats))
            }

    def writer_of(self, path: Path) -> Job | None:
        """Return the job that writes a file; None if it is not an output."""
        if not self._writers:
            return None
        if path not in self._found:
            try:
                # Before a job is made its output may be missing, or a link that leads elsewhere: both names count.
                names = os.path.realpath(path), os.path.join(os.path.realpath(path.parent), path.name)
            except (OSError, ValueError):  # a name that no file can have
                names = ("", "")
            self._found[path] = next((self._writers[name] for name in names if name in self._writers), None)
        return self._found[path]

    def header_of(self, writer: Job, geometry: Geometry) -> "LatentsHeader":
        """Return the header of the latents that a job writes."""
        from pusa.generate.latents import LatentsHeader

        channels, frames, height, width = geometry.latent_shape(writer.width, writer.height, writer.num_frames)
        facts = {"latent_space": self._space_name or "", "cyclic": str(writer.cyclic).lower()}
        return LatentsHeader((channels, frames - writer.cyclic, height, width), True, facts)

    def inputs_of(self, job: Job) -> list[tuple[Path, Job]]:
        """Return the inputs of a job that a job writes, each with this job."""
        return [(path, writer) for path in paths_of(job) if (writer := self.writer_of(path)) is not None]

    def reads(self, job: Job) -> list[str]:
        """Return the ids of the jobs whose results a job reads."""
        return list(dict.fromkeys(writer.id for _, writer in self.inputs_of(job)))

    def in_order(self) -> tuple[list[Job], dict[str, str]]:
        """Return the jobs, each after those whose results it reads, and by id why a job has no such place.

        Of jobs that wait for nothing, those of a higher priority come first, then those that the manifest names first.
        A job has the priority of the jobs that wait for it, where that is higher than its own.
        """
        by_id = {job.id: job for job in self._jobs}
        reads = {id: self.reads(job) for id, job in by_id.items()}
        places = {id: place for place, id in enumerate(by_id)}
        priorities = {id: job.priority for id, job in by_id.items()}
        for id in reversed(_sorted_by_reads(reads, places)):
            for read in reads[id]:
                priorities[read] = max(priorities[read], priorities[id])
        ids = _sorted_by_reads(reads, {id: (-priorities[id], place) for id, place in places.items()})
        circular = {id: self._describe_circle(by_id[id]) for id in by_id.keys() - set(ids)}
        return [by_id[id] for id in ids], circular

    def require_free(self, job: Job) -> None:
        """Check that a job's files can be written.

        Raises:
            ConditionError: something else than a file has the name of one of them.
        """
        ends = [VIDEO, LATENTS, RECORD, *(FORMATS[name].end for name in job.formats)]
        for path in [self._folder / f"{job.id}{end}" for end in ends] if self._folder else []:
            is_file = not path.name.endswith(FORMATS["png"].end)
            if path.exists() and not (path.is_file() if is_file else path.is_dir()):
                kind = "a folder" if path.is_dir() else "a file" if path.is_file() else "not a regular file"
                writes = "file" if is_file else "folder"
                raise ConditionError(
                    f"{path} is {kind}, and the job writes a {writes} of this name; remove or rename it"
                )

    def _describe_circle(self, job: Job) -> str:
        path, writer = self.inputs_of(job)[0]
        if writer is job:
            return f"its input {path} is its own result"
        return f"its input {path} is the result of job {writer.id}, and no order of the jobs makes that first"


NO_OUTPUTS = Outputs()


def _sorted_by_reads(reads: Mapping[str, Sequence[str]], ranks: Mapping[str, Any]) -> list[str]:
    """Return ids after those that they read, lower ranks first; without those that are in a circle or wait for one."""
    sorter = TopologicalSorter(reads)
    with suppress(CycleError):  # the sorter still yields every id that does not depend on a circle
        sorter.prepare()
    ids: list[str] = []
    ready: list[tuple[Any, str]] = []
    while True:
        for id in sorter.get_ready():
            heappush(ready, (ranks[id], id))
        if not ready:
            return ids
        ids.append(heappop(ready)[1])
        sorter.done(ids[-1])


def paths_of(job: Job) -> list[Path]:
    """Return the files that a job names."""
    return list(dict.fromkeys(paths_in(job.model_dump())))


def with_paths_changed(value: Any, change: Callable[[Path], Any]) -> Any:
    """Return settings with every path replaced by what `change` makes of it."""
    if isinstance(value, dict):
        return {key: with_paths_changed(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [with_paths_changed(inner, change) for inner in value]
    return change(value) if isinstance(value, Path) else value


def paths_in(value: Any) -> Iterator[Path]:
    """Yield the paths in settings."""
    if isinstance(value, Path):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from paths_in(inner)
