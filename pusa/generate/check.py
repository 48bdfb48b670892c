"""Check the jobs of a manifest and describe their inputs, before any weights are loaded."""

from functools import partial

from pusa.backbones import find_family
from pusa.backbones.family import Geometry
from pusa.errors import ConditionError, MediaError, PusaError, error_messages
from pusa.generate.conditions import LatentsInput, open_input, pinned_indices
from pusa.manifest.models import GenerateManifest
from pusa.tasks.base import Condition, Job, Pass, resolve_positions


def check_jobs(manifest: GenerateManifest, with_inputs: bool = True) -> dict[str, str]:
    """Return the problems of each job that cannot be made, by its id: sizes, positions, multipliers, inputs.

    Args:
        manifest: the manifest.
        with_inputs: also open the input files. False if an earlier stage has yet to write them.
    """
    geometry = geometry_of(manifest)
    checked: dict[str, str] = {}
    problems = {job.id: "; ".join(_job_problems(job, geometry, with_inputs, checked)) for job in manifest.jobs}
    return {id: text for id, text in problems.items() if text}


def geometry_of(manifest: GenerateManifest) -> Geometry:
    """Return how the manifest's backbone turns pixels into latents."""
    return find_family(manifest.model.backbone).geometry


def describe_inputs(job: Job, geometry: Geometry) -> list[str]:
    """Describe each input of a job: which frames of which file give which latent frames, with which multipliers.

    Raises:
        MediaError: an input cannot be opened.
        ConditionError: an input does not fit the job.
    """
    return [
        f"{open_input(condition, job, geometry)}: {condition.describe()}"
        for run in job.passes(geometry)
        for condition in run.conditions
        if condition.source is not None
    ]


def has_pinned_input(job: Job, geometry: Geometry) -> bool:
    """Return whether an input has multiplier 0 anywhere, without which `exact` has nothing to put back."""
    return any(pinned_indices(condition) for run in job.passes(geometry) for condition in run.conditions)


def _job_problems(job: Job, geometry: Geometry, with_inputs: bool, checked: dict[str, str]) -> list[str]:
    """Return the problems of a job.

    `checked` maps the kind and path of each input that was read whole to its error, "" if there was none. It is shared
    by all jobs, so that an input of many jobs is read once.
    """
    size_problems = error_messages(lambda: geometry.check(job.width, job.height, job.num_frames))
    try:
        passes = job.passes(geometry)
    except ConditionError as error:
        return [*size_problems, str(error)]
    problems = list(size_problems)
    for run in passes:
        if not size_problems:  # errors that follow from a wrong size would mislead
            places = [place for condition in run.conditions for place in condition.place]
            problems += error_messages(partial(resolve_positions, places, len(run.timeline.starts), "position"))
            problems += error_messages(partial(_require_free_frames, run))
        for condition in run.conditions if with_inputs else ():
            check = partial(_check_input, condition, job, geometry, checked)
            problems += error_messages(check, MediaError if size_problems else PusaError)
    return problems


def _require_free_frames(run: Pass) -> None:
    frames = len(run.timeline.starts)
    if sum(multiplier == 0 for condition in run.conditions for multiplier in condition.multipliers) >= frames:
        raise ConditionError(f"all {frames} latent frames are given with multiplier 0; expected one free frame or more")


def _check_input(condition: Condition, job: Job, geometry: Geometry, checked: dict[str, str]) -> None:
    if condition.source is None:
        return
    opened = open_input(condition, job, geometry)
    use = f"{type(opened).__name__} {condition.source}"  # a file may be a clip in one job and a picture in another
    if use not in checked:
        checked[use] = "".join(error_messages(opened.check))
    if checked[use]:
        raise MediaError(checked[use])
    if job.exact and isinstance(opened, LatentsInput) and pinned_indices(condition):
        opened.pixels()  # raises: it has none
