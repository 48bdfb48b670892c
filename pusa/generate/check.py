"""What is wrong with a manifest's jobs, and what each is given, before any weights are loaded."""

from collections.abc import Iterator
from functools import partial

from pusa.backbones import find_family
from pusa.backbones.family import Geometry
from pusa.errors import ConditionError, MediaError, PusaError, error_messages
from pusa.generate.conditions import Kept, open_source
from pusa.generate.render import pinned
from pusa.manifest.models import GenerateManifest
from pusa.tasks.base import Condition, Job, Pass, resolve_positions


def check_jobs(manifest: GenerateManifest, with_inputs: bool = True) -> dict[str, str]:
    """What is wrong with each job that cannot be made: sizes, positions, multipliers, inputs. Loads no weights.

    `with_inputs=False` leaves the files alone, which an earlier stage may have yet to write.
    """
    geometry = geometry_of(manifest)
    broken: dict[str, str] = {}
    wrong = {job.id: "; ".join(_problems(job, geometry, with_inputs, broken)) for job in manifest.jobs}
    return {id: problems for id, problems in wrong.items() if problems}


def geometry_of(manifest: GenerateManifest) -> Geometry:
    """What the manifest's backbone makes of pixels."""
    return find_family(manifest.model.backbone).geometry


def _problems(job: Job, geometry: Geometry, with_inputs: bool, broken: dict[str, str]) -> Iterator[str]:
    """What is wrong with a job. `broken`: what was found reading sources whole, by use and path, "" for nothing."""
    size = error_messages(lambda: geometry.check(job.width, job.height, job.num_frames))
    yield from size
    try:
        passes = job.passes(geometry)
    except ConditionError as error:
        yield str(error)
        return
    for run in passes:
        if not size:  # what follows from a wrong size would only mislead
            places = [place for condition in run.conditions for place in condition.place]
            yield from error_messages(partial(resolve_positions, places, len(run.timeline.starts), "position"))
            yield from error_messages(partial(_require_free, run))
        for condition in run.conditions if with_inputs else ():
            yield from error_messages(
                partial(_check_source, condition, job, geometry, broken), MediaError if size else PusaError
            )


def _require_free(run: Pass) -> None:
    kept = sum(multiplier == 0 for condition in run.conditions for multiplier in condition.multipliers)
    if kept >= len(run.timeline.starts):
        raise ConditionError(f"all {len(run.timeline.starts)} latent frames are given, with multiplier 0; none is made")


def _check_source(condition: Condition, job: Job, geometry: Geometry, broken: dict[str, str]) -> None:
    if condition.source is None:
        return
    source = open_source(condition, job, geometry)
    use = f"{type(source).__name__} {condition.source}"  # one file may be a clip to one job and a picture to another
    if use not in broken:
        broken[use] = "".join(error_messages(source.check))
    if broken[use]:
        raise MediaError(broken[use])
    if job.exact and pinned(condition) and isinstance(source, Kept):
        source.pixels()  # it has none


def told(job: Job, geometry: Geometry) -> list[str]:
    """For people: which frames of which file are given, as which latent frames, with which multipliers.

    Raises:
        MediaError: a source cannot be opened.
        ConditionError: it does not fit the job.
    """
    return [
        f"{open_source(condition, job, geometry)}: {condition.describe()}"
        for run in job.passes(geometry)
        for condition in run.conditions
        if condition.source is not None
    ]


def is_pinned(job: Job, geometry: Geometry) -> bool:
    """Whether a file is given with multiplier 0, so that exact mode has something to put back."""
    return any(pinned(condition) for run in job.passes(geometry) for condition in run.conditions)
