"""What is wrong with a manifest's jobs, and what each is given, before any weights are loaded."""

from collections.abc import Iterator

from pusa.backbones import BACKBONES
from pusa.backbones.base import Geometry
from pusa.conditions import Kept, Source, open_source
from pusa.errors import ConditionError, MediaError
from pusa.exact import pinned
from pusa.manifest import GenerateManifest
from pusa.tables import find
from pusa.tasks.base import Condition, Job, positions


def check_jobs(manifest: GenerateManifest, with_inputs: bool = True) -> dict[str, str]:
    """What is wrong with each job that cannot be made: sizes, positions, multipliers, inputs. Loads no weights.

    `with_inputs=False` leaves the files alone, which an earlier stage may have yet to write.
    """
    geometry = geometry_of(manifest)
    checked: dict[str, str] = {}
    wrong = {job.id: "; ".join(_problems(job, geometry, checked if with_inputs else None)) for job in manifest.jobs}
    return {id: problems for id, problems in wrong.items() if problems}


def geometry_of(manifest: GenerateManifest) -> Geometry:
    """What the manifest's backbone makes of pixels."""
    geometry: Geometry = find(BACKBONES, manifest.model.backbone, "backbone").geometry
    return geometry


def _problems(job: Job, geometry: Geometry, checked: dict[str, str] | None) -> Iterator[str]:
    """What is wrong with a job. `checked`: what was found reading each source whole, by its path; None to read none."""
    try:
        geometry.check(job.width, job.height, job.num_frames)
    except ConditionError as error:
        yield str(error)
        return  # what follows from the size would only repeat it
    try:
        passes = job.passes(geometry)
    except ConditionError as error:
        yield str(error)
        return
    for run in passes:
        try:
            positions([p for c in run.conditions for p in c.place], len(run.course.starts), "position")
        except ConditionError as error:
            yield str(error)
        for condition in run.conditions if checked is not None else ():
            assert checked is not None
            yield from _problems_of_source(condition, job, geometry, checked)


def _problems_of_source(condition: Condition, job: Job, geometry: Geometry, checked: dict[str, str]) -> Iterator[str]:
    if condition.source is None:
        return
    try:
        source = open_source(condition, job, geometry)
        if str(condition.source) not in checked:
            checked[str(condition.source)] = _broken(source)
        if job.exact and pinned(condition) and isinstance(source, Kept):
            source.pixels()
    except (MediaError, ConditionError) as error:
        yield str(error)
    else:
        yield from filter(None, [checked[str(condition.source)]])


def _broken(source: Source) -> str:
    try:
        source.check()
    except MediaError as error:
        return str(error)
    return ""


def told(job: Job, geometry: Geometry) -> list[str]:
    """For people: which frames of which file are given, as which latent frames, with which multipliers.

    Raises:
        MediaError: a source cannot be opened.
        ConditionError: it does not fit the job.
    """
    return [
        f"{open_source(condition, job, geometry)}: {condition.told()}"
        for run in job.passes(geometry)
        for condition in run.conditions
        if condition.source is not None
    ]
