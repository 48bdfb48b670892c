"""Sample the latents of jobs, pass by pass: one job by itself, or several of equal shape in one batch.

All that the encoders give is prepared before, so that sampling touches only the transformer. A long sampling saves its
state from time to time, and continues from it with the same bits.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Generator, Tensor

from pusa.backbones.family import Family, Geometry
from pusa.diffusion.courses import SCHEDULE, parse_course, release
from pusa.diffusion.noise_schedules import find_noise_schedule
from pusa.diffusion.sampler import (
    Given,
    OnStep,
    Phase,
    Pinned,
    TextFeatures,
    Velocity,
    deciding_levels,
    delayed,
    denoise,
    guided,
    start_state,
    windowed,
    within_memory,
)
from pusa.diffusion.seeds import seeded
from pusa.diffusion.windows import whole
from pusa.errors import ConditionError, NotFiniteError, error_messages
from pusa.generate.conditions import place_latents
from pusa.generate.encodings import Encodings, FileHashes
from pusa.generate.latents import require_finite
from pusa.generate.saved import Saved, State
from pusa.system.files import sha256_file
from pusa.tasks.base import Job, Pass
from pusa.weights.load import is_finite
from pusa.weights.model import Model

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedPass:
    """One run of the sampler, and what its inputs give. Conditions without a source take the pass before."""

    run: Pass
    given: tuple[Given, ...]

    def all_given(self, previous_CFhw: Tensor | None) -> list[Given]:
        """Return everything that is given, also of the latents of the pass before."""
        frames = len(self.run.timeline.starts)
        given = list(self.given)
        for condition in self.run.conditions:
            if condition.source is None:
                assert previous_CFhw is not None
                given.append(place_latents(condition, previous_CFhw, frames))
        return given


@dataclass(frozen=True)
class Prepared:
    """A job with everything that the encoders give for it, on the CPU. With guidance 1, `null` is None.

    Its noise is drawn from `generator`, by default from one of its own seed.
    """

    job: Job
    text: TextFeatures
    null: TextFeatures | None
    passes: tuple[PreparedPass, ...]
    generator: Generator | None = None


def prepare(job: Job, model: Model, encodings: Encodings, hashes: FileHashes) -> Prepared:
    """Return a job with its prompts and inputs encoded. The transformer is not touched.

    Raises:
        MediaError: an input cannot be read, or was changed while it was read.
        ConditionError: an input does not fit the job.
        NotFiniteError: an encoder computes values that are not finite.
    """
    text = _finite_text(encodings, job.prompt, "prompt")
    null = None if job.guidance == 1 else _finite_text(encodings, job.negative_prompt, "negative_prompt")
    passes = []
    for run in job.passes(model.backbone.geometry):
        given = []
        for condition in run.conditions:
            if condition.source is not None:
                latents_CFhw = encodings.given(condition, job, hashes)
                require_finite(latents_CFhw, f"the latents of {condition.source.name}")
                given.append(place_latents(condition, latents_CFhw, len(run.timeline.starts)))
        passes.append(PreparedPass(run, tuple(given)))
    return Prepared(job, text, null, tuple(passes))


def _finite_text(encodings: Encodings, prompt: str, name: str) -> TextFeatures:
    text = encodings.text(prompt)
    require_finite(text.features, f"the text features of {name}")
    if text.pooled is not None:
        require_finite(text.pooled, f"the pooled text features of {name}")
    return text


def total_steps(job: Job, geometry: Geometry) -> int:
    """Return the number of steps over all passes of a job: how often sampling calls `on_step`."""
    return _count_steps(job, job.passes(geometry))


def _count_steps(job: Job, passes: Iterable[Pass]) -> int:
    return sum(job.steps + run.timeline.delay for run in passes)


def pass_after(passes: Sequence[Pass], steps: int, made: int) -> tuple[int, int]:
    """Return the number of the pass that a job is in after `made` steps, 1 or more, and how many are of this pass.

    Args:
        passes: those of the job.
        steps: the job's steps.
        made: the steps that are made, of all passes.
    """
    for index, run in enumerate(passes[:-1]):
        if made <= (length := steps + run.timeline.delay):
            return index, made
        made -= length
    return len(passes) - 1, made


def batches(jobs: Sequence[Job], family: Family, batch_tokens: int) -> list[tuple[Job, ...]]:
    """Return jobs in batches to sample together, in the order of the first of each.

    Together are jobs of one size, length, number of steps, embedded guidance and priority, all with guidance or all
    without, of which the network sees all latent frames at each step; with two experts also of one noise schedule and
    without `levels`, so that all change the expert at the same step. A batch has at most `batch_tokens` tokens, and a
    job with guidance counts twice. Every other job is alone.
    """
    geometry = family.geometry
    made: list[list[Job]] = []
    open_batches: dict[tuple[object, ...], list[Job]] = {}
    for job in jobs:
        shape = geometry.latent_shape(job.width, job.height, job.num_frames)
        most = batch_tokens // (geometry.tokens((1, *shape)) * (1 if job.guidance == 1 else 2))
        steps = _steps_if_seen_whole(job, geometry)
        if most < 2 or not steps or (family.experts and job.levels != SCHEDULE):
            made.append([job])
            continue
        schedule = job.noise_schedule if family.experts else ""
        kind = (*shape, steps, job.guidance == 1, job.embedded_guidance, job.priority, schedule)
        if kind not in open_batches or len(open_batches[kind]) == most:
            open_batches[kind] = []
            made.append(open_batches[kind])
        open_batches[kind].append(job)
    return [tuple(batch) for batch in made]


def batches_by_depth(
    jobs: Sequence[Job], reads: Mapping[str, Sequence[str]], family: Family, batch_tokens: int
) -> list[tuple[Job, ...]]:
    """Return `batches` of jobs, in the order of the first of each; those that share one read no result of each other.

    Args:
        jobs: the jobs, each after those that it reads.
        reads: for each job the ids of those whose results it reads.
        family: of the model.
        batch_tokens: as for `batches`.
    """
    depth: dict[str, int] = {}
    levels: dict[int, list[Job]] = {}
    for job in jobs:
        depth[job.id] = 1 + max((depth.get(id, 0) for id in reads[job.id]), default=0)
        levels.setdefault(depth[job.id], []).append(job)
    position = {job.id: place for place, job in enumerate(jobs)}
    found = [batch for level in levels.values() for batch in batches(level, family, batch_tokens)]
    return sorted(found, key=lambda batch: position[batch[0].id])


def _steps_if_seen_whole(job: Job, geometry: Geometry) -> int:
    """Return the steps of a job of one pass, in which the network sees all latent frames at each step; 0 for others."""
    try:
        passes = job.passes(geometry)
    except ConditionError:  # it will fail by itself
        return 0
    timeline = passes[0].timeline
    is_whole = len(passes) == 1 and timeline.windows == whole(len(timeline.starts)).windows
    return _count_steps(job, passes) if is_whole else 0


def sample_together(
    prepared: Sequence[Prepared],
    model: Model,
    on_step: OnStep = lambda step, x0: None,
    saved: Saved | None = None,
    stop: int | None = None,
) -> list[Tensor | NotFiniteError]:
    """Sample one job, or those of one of `batches`; return for each its latents (C, F, h, w), fp32 on the CPU.

    Instead of latents, a job has the error if they are not finite; the others do not suffer.

    Args:
        prepared: the jobs.
        model: the model; only its transformer is used.
        on_step: called after each denoising step that is made now, as by `sample`.
        saved: keeps the state, and gives the one to continue from.
        stop: the number of steps, over all passes and more than are saved, after which the state is saved, with the
            estimates of the clean latents. If more steps would follow, these estimates are returned.

    Raises:
        Exception: one sample alone does not fit in memory, or another error of the transformer.
        OSError: the state cannot be saved where sampling stops.
    """
    jobs = [one.job for one in prepared]
    total = _count_steps(jobs[0], (one.run for one in prepared[0].passes))
    state = (saved and saved.state) or State()
    done, z_BCFhw, failed = state.done, state.previous_BCFhw, dict(state.failed or {})
    noise = _Noise(prepared, model.backbone.geometry)
    for index, runs in enumerate(zip(*(one.passes for one in prepared), strict=True)):
        noise_BCFhw, unknown_C1hw = noise.draw(len(runs[0].run.timeline.starts))
        if index < state.index:  # made before; but for its noise, which comes before that of the next pass
            continue
        previous_BCFhw, first = z_BCFhw, state.step if index == state.index else 0
        start = _start(jobs, runs, noise_BCFhw, previous_BCFhw)
        if first and state.z_BCFhw is not None:
            start = replace(start, z_BCFhw=state.z_BCFhw)
        z_BCFhw = start.z_BCFhw
        steps = _denoised(prepared, model, runs[0].run, start, unknown_C1hw, first)
        for step, z_BCFhw, x0_BCFhw in steps:
            done += 1
            failed = _not_finite(x0_BCFhw, f"the latents after denoising step {done} of {total}") | failed
            if len(failed) == len(jobs):
                break
            now = State(index, step + 1, done, z_BCFhw, previous_BCFhw, failed)
            if saved and done != stop:
                saved.keep(now, total)
            elif saved:
                saved.save(replace(now, x0_BCFhw=x0_BCFhw), total)
            on_step(step, x0_BCFhw)
            if done == stop and stop < total:
                return rows_of(x0_BCFhw, failed)
        z_BCFhw = z_BCFhw.cpu()
        if len(failed) == len(jobs):
            break
    assert z_BCFhw is not None
    return rows_of(z_BCFhw, _not_finite(z_BCFhw, "the sampled latents") | failed)


def rows_of(z_BCFhw: Tensor, failed: Mapping[int, str]) -> list[Tensor | NotFiniteError]:
    """Return each job's latents (C, F, h, w) on the CPU, or the error of one that failed."""
    return [NotFiniteError(failed[row]) if row in failed else z_CFhw for row, z_CFhw in enumerate(z_BCFhw.cpu())]


def sample_job(job: Job, model: Model, on_step: OnStep = lambda step, x0: None) -> Tensor:
    """Prepare and sample one job; return its latents (C, F, h, w), fp32 on the CPU. Arguments: as `sample_together`.

    Raises:
        MediaError: an input cannot be read.
        ConditionError: an input does not fit the job.
        NotFiniteError: a part of the model computes values that are not finite; the message names the step.
    """
    (made,) = sample_together([prepare(job, model, Encodings(model, None), _FreshHashes())], model, on_step)
    if isinstance(made, NotFiniteError):
        raise made
    return made


class _FreshHashes:
    """Hashes of files of which none is remembered."""

    def hash_of(self, path: Path) -> str:
        return sha256_file(path)


class _Noise:
    """The noise of each job of a batch, from its own generator or seed, pass by pass."""

    def __init__(self, prepared: Sequence[Prepared], geometry: Geometry) -> None:
        self._generators = [one.generator or seeded(one.job.seed) for one in prepared]
        job = prepared[0].job
        self._channels, _, *self._size = geometry.latent_shape(job.width, job.height, job.num_frames)

    def draw(self, frames: int) -> tuple[Tensor, Tensor]:
        """Draw a pass's noise (B, C, F, h, w), and that in place of an unknown frame (C, 1, h, w), of the first job."""
        pairs = [
            [torch.randn(self._channels, n, *self._size, generator=g, device=g.device).cpu() for n in (frames, 1)]
            for g in self._generators
        ]
        return torch.stack([noise_CFhw for noise_CFhw, _ in pairs]), pairs[0][1]


@dataclass(frozen=True)
class _Start:
    """The state in which a pass starts, and its levels: of frames of multiplier 0 where they are not 0, `pinned`."""

    z_BCFhw: Tensor
    levels_NBF: Tensor
    pinned: Pinned | None


def _start(
    jobs: Sequence[Job], runs: Sequence[PreparedPass], noise_BCFhw: Tensor, previous_BCFhw: Tensor | None
) -> _Start:
    """Return the start of a pass of a batch."""
    starts, levels, exact = [], [], []
    for row, (job, run) in enumerate(zip(jobs, runs, strict=True)):
        given = run.all_given(None if previous_BCFhw is None else previous_BCFhw[row])
        start_CFhw, multipliers_F = start_state(given, noise_BCFhw[row])
        starts.append(start_CFhw)
        levels.append(levels_of(job, run.run, multipliers_F))
        exact.append(multipliers_F == 0)
    z_BCFhw, levels_NBF = torch.stack(starts), torch.stack(levels, 1)
    mask_BF = torch.stack(exact) & (levels_NBF[0] > 0)
    if not mask_BF.any():
        return _Start(z_BCFhw, levels_NBF, None)
    pinned = Pinned(z_BCFhw, noise_BCFhw, mask_BF)
    return _Start(pinned.at(z_BCFhw, levels_NBF[0]), levels_NBF, pinned)


def _denoised(
    prepared: Sequence[Prepared],
    model: Model,
    run: Pass,
    start: _Start,
    unknown_C1hw: Tensor,
    first: int,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Make the steps of a pass from number `first` on, as `denoise`, phase by phase: each has one transformer."""
    jobs, timeline = [one.job for one in prepared], run.timeline
    own_NF = _schedule(jobs[0], torch.ones(len(timeline.starts)))
    if run.levels != SCHEDULE:
        pinned_F = start.pinned.mask_BF[0] if start.pinned else torch.zeros(own_NF.shape[1], dtype=torch.bool)
        own_NF = deciding_levels(start.levels_NBF[:, 0], pinned_F)
    phases = model.phases(own_NF, timeline)
    assert len(phases) == 1 or len({(job.noise_schedule, job.levels) for job in jobs}) == 1, "`batches` separates them"
    z_BCFhw, pinned = start.z_BCFhw.to(model.device), start.pinned and start.pinned.to(model.device)
    for phase in phases:
        steps = range(max(first, phase.steps.start), phase.steps.stop)
        velocity = windowed(_velocity(prepared, model, phase), map(timeline.windows, steps), unknown_C1hw)
        for step, z_BCFhw, x0_BCFhw in denoise(velocity, z_BCFhw, start.levels_NBF, steps, pinned):  # noqa: B020
            yield step, z_BCFhw, x0_BCFhw


def levels_of(job: Job, run: Pass, multipliers_F: Tensor) -> Tensor:
    """Return the levels (steps + 1, F), over all steps of a job's run, of frames that have these multipliers."""
    if not isinstance(run.levels, str):
        return torch.tensor(run.levels)
    levels_NF = _schedule(job, multipliers_F)
    if run.levels != SCHEDULE:
        sigma_N = _schedule(job, torch.ones(1))[:, 0]
        released_N = torch.tensor(release(sigma_N.tolist(), *parse_course(run.levels)[1]))
        levels_NF = torch.where(multipliers_F == 0, released_N[:, None], levels_NF)
    return delayed(levels_NF, run.timeline.starts)


def _schedule(job: Job, multipliers_F: Tensor) -> Tensor:
    """Return the levels (N + 1, F) of a job's frames that have these multipliers, as if all started at once."""
    levels_NF: Tensor = find_noise_schedule(job.noise_schedule)(job.steps, multipliers_F)
    return levels_NF


def _velocity(prepared: Sequence[Prepared], model: Model, phase: Phase) -> Velocity:
    """Return the velocity of a batch of jobs, all of them with guidance or none, in one phase."""
    embedded_guidance = prepared[0].job.embedded_guidance  # that of all: `batches` keeps others apart

    def predict(z_BCFhw: Tensor, sigma_BF: Tensor, text: TextFeatures) -> Tensor:
        return model.backbone.predict(model.denoiser(phase.expert), z_BCFhw, sigma_BF, text, embedded_guidance)

    text = TextFeatures.cat([one.text for one in prepared]).to(model.device)
    nulls = [one.null for one in prepared if one.null is not None]
    if not nulls:
        return guided(within_memory(predict), text, text, 1)
    guidance_B = torch.tensor([one.job.guidance for one in prepared], device=model.device)
    return guided(within_memory(predict), text, TextFeatures.cat(nulls).to(model.device), guidance_B)


def _not_finite(values_BCFhw: Tensor, what: str) -> dict[int, str]:
    """Return why a row is of no use, by its number, for those with values that are not finite."""
    if is_finite(values_BCFhw):
        return {}
    found = {row: error_messages(partial(require_finite, one, what)) for row, one in enumerate(values_BCFhw)}
    return {row: messages[0] for row, messages in found.items() if messages}
