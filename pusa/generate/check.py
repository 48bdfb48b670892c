"""Check the jobs of a manifest and describe their inputs, before any weights are loaded."""

from collections.abc import Container
from functools import partial
from pathlib import Path

from pusa.backbones import find_family
from pusa.backbones.family import Geometry
from pusa.errors import ConditionError, MediaError, PusaError, WeightsError, error_messages
from pusa.generate.conditions import LatentsInput, open_input, pinned_indices
from pusa.generate.outputs import NO_OUTPUTS, Outputs
from pusa.manifest.models import GenerateManifest, ModelSpec
from pusa.system.failures import Failure, attempt
from pusa.tasks.base import Condition, Job, Pass, resolve_positions
from pusa.video.formats import require_encoders
from pusa.weights.hub import HUB_PREFIX
from pusa.weights.resolve import latent_space, locate_part

MAX_LEVELS = 1 << 28  # of one pass of a job; the matrix of levels has 4 bytes for each


class JobChecks:
    """What is wrong with the jobs of a manifest. `pusa check` and the stage itself both ask here.

    Args:
        manifest: the manifest.
        folder: where the jobs' videos go, for jobs that read what others write; None if they are not written.
        space_name: the latent space of the model; None if it is unknown.
        with_inputs: also open the input files. False if an earlier stage has yet to write them.
    """

    def __init__(
        self, manifest: GenerateManifest, folder: Path | None, space_name: str | None, with_inputs: bool = True
    ) -> None:
        self._geometry, self._space_name, self._with_inputs = geometry_of(manifest), space_name, with_inputs
        self.outputs = Outputs(folder, manifest.jobs, space_name)
        self._in_order, self._circular = self.outputs.in_order()
        self._ids = [job.id for job in manifest.jobs]
        # The kind and path of each input that was read whole -> its error, "" if there was none. An input of many jobs
        # is read once.
        self._checked: dict[str, str] = {}

    def failures(self) -> dict[str, Failure]:
        """Return why each job that cannot be made fails, by its id: sizes, positions, multipliers, inputs, outputs."""
        failures = {id: Failure(problem) for id, problem in self._circular.items()}
        for job in self._in_order:
            found = attempt(partial(self._problems, job, failures), None)
            if isinstance(found, Failure) or found:
                failures[job.id] = found if isinstance(found, Failure) else Failure("; ".join(found))
        return {id: failures[id] for id in self._ids if id in failures}

    def describe_inputs(self, job: Job) -> list[str]:
        """Describe each input of a job, as the function `describe_inputs`."""
        return describe_inputs(job, self._geometry, self.outputs)

    def in_order(self) -> list[Job]:
        """Return the jobs, each after those whose results it reads."""
        return self._in_order

    def _problems(self, job: Job, failed: Container[str]) -> list[str]:
        geometry = self._geometry
        problems = error_messages(partial(require_inputs_made, job, self.outputs, failed))
        problems += error_messages(partial(self.outputs.require_free, job))
        problems += error_messages(partial(require_encoders, job.formats))
        size_problems = error_messages(partial(geometry.check, job.width, job.height, job.num_frames))
        problems += size_problems
        try:
            passes = job.passes(geometry)
        except ConditionError as error:
            return [*problems, str(error)]
        for run in passes:
            if not size_problems:  # errors that follow from a wrong size would mislead
                places = [place for condition in run.conditions for place in condition.place]
                problems += error_messages(partial(resolve_positions, places, len(run.timeline.starts), "position"))
                problems += error_messages(partial(_require_free_frames, run))
                problems += error_messages(partial(_require_bounded_levels, job, run))
            for condition in run.conditions if self._with_inputs else ():
                check = partial(self._check_input, condition, job)
                problems += error_messages(check, MediaError if size_problems else PusaError)
        return problems

    def _check_input(self, condition: Condition, job: Job) -> None:
        if condition.source is None:
            return
        opened = open_input(condition, job, self._geometry, self.outputs)
        use = f"{type(opened).__name__} {condition.source}"  # a file may be a clip in one job and a picture in another
        if use not in self._checked:
            made_here = self.outputs.writer_of(condition.source) is not None
            self._checked[use] = "" if made_here else "".join(error_messages(opened.check))
        if self._checked[use]:
            raise MediaError(self._checked[use])
        if isinstance(opened, LatentsInput) and self._space_name:
            opened.require_space(self._space_name)
        if job.exact and isinstance(opened, LatentsInput) and pinned_indices(condition):
            opened.pixels()  # raises: it has none


def check_jobs(manifest: GenerateManifest, with_inputs: bool = True, folder: Path | None = None) -> dict[str, str]:
    """Return the problems of each job that cannot be made, by its id. No weights are loaded.

    Args:
        manifest: the manifest.
        with_inputs: as for `JobChecks`.
        folder: as for `JobChecks`.
    """
    space_name = stored_space(manifest.model) if with_inputs else None
    failures = JobChecks(manifest, folder, space_name, with_inputs).failures()
    return {id: failure.message for id, failure in failures.items()}


def require_inputs_made(job: Job, outputs: Outputs, failed: Container[str]) -> None:
    """Check that none of a job's inputs is the result of a job that failed.

    Raises:
        ConditionError: an input is; an older file of its name would be of other settings.
    """
    for path, writer in outputs.inputs_of(job):
        if writer.id in failed:
            raise ConditionError(f"its input {path.name} is the result of job {writer.id}, which cannot be made")


def stored_space(spec: ModelSpec) -> str | None:
    """Return the latent space of a transformer on this machine; None if it is on a hub, or cannot be used."""
    transformer = find_family(spec.backbone).transformers[0]  # `require_model` says where two differ
    names = (spec.checkpoint_of(transformer) or spec.weights, *(lora.weights for lora in spec.adapters))
    if any(name.startswith(HUB_PREFIX) for name in names):
        return None
    try:
        return latent_space(spec, locate_part(spec, transformer))
    except WeightsError:  # `require_model` says why
        return None


def geometry_of(manifest: GenerateManifest) -> Geometry:
    """Return how the manifest's backbone turns pixels into latents."""
    return find_family(manifest.model.backbone).geometry


def describe_inputs(job: Job, geometry: Geometry, outputs: Outputs = NO_OUTPUTS) -> list[str]:
    """Describe each input of a job: which frames of which file give which latent frames, with which multipliers.

    Raises:
        MediaError: an input cannot be opened.
        ConditionError: an input does not fit the job.
    """
    return [
        f"{open_input(condition, job, geometry, outputs)}: {condition.describe()}"
        for run in job.passes(geometry)
        for condition in run.conditions
        if condition.source is not None
    ]


def has_pinned_input(job: Job, geometry: Geometry) -> bool:
    """Return whether an input has multiplier 0 anywhere, without which `exact` has nothing to put back."""
    return any(pinned_indices(condition) for run in job.passes(geometry) for condition in run.conditions)


def _require_free_frames(run: Pass) -> None:
    frames = len(run.timeline.starts)
    if sum(multiplier == 0 for condition in run.conditions for multiplier in condition.multipliers) >= frames:
        raise ConditionError(f"all {frames} latent frames are given with multiplier 0; expected one free frame or more")


def _require_bounded_levels(job: Job, run: Pass) -> None:
    frames, steps = len(run.timeline.starts), job.steps + run.timeline.delay
    if frames * steps > MAX_LEVELS:
        raise ConditionError(
            f"{frames:,} latent frames over {steps:,} steps have {frames * steps:,} levels; at most {MAX_LEVELS:,} are "
            "allowed: use fewer frames, fewer steps, or a larger window"
        )
