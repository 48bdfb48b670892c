"""Reduce a job to what determines its pixels, so that jobs that mean the same video have the same settings.

Nothing is concluded from the names of keys: other values are tried, and they are used where the job's runs of the
sampler stay the same. So two jobs of different videos can never get the same settings.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import ImageColor

from pusa.backbones.family import Geometry
from pusa.diffusion.courses import SCHEDULE
from pusa.diffusion.windows import whole
from pusa.errors import PusaError
from pusa.generate.conditions import pinned_indices
from pusa.generate.latents import LATENTS_SUFFIX
from pusa.generate.ledger import LATER
from pusa.generate.outputs import with_paths_changed
from pusa.generate.sampling import levels_of
from pusa.system.files import digest
from pusa.tasks.base import Condition, Job, Pass, Settings
from pusa.tasks.completion import Completion
from pusa.tasks.image_to_video import ImageToVideo
from pusa.tasks.keyframes import Keyframes
from pusa.tasks.segmented import Segmented

NOT_OF_THE_VIDEO = frozenset({"id", "priority", "formats", "embed"})  # settings that never count
VERSION = 2  # part of each job's key; raise it when the same settings come to make another video
Changes = Mapping[str, Any]  # other values of some keys


def job_key(
    job: Job,
    geometry: Geometry,
    fingerprints: Mapping[str, str],
    hash_of: Callable[[Path], str],
    without: Set[str] = frozenset(),
) -> str:
    """Return a hash of everything that a video depends on: settings, weights, and the bytes of inputs, not their names.

    Settings without effect on it do not count, and neither do those that `without` names. `hash_of` hashes an input.
    """
    rules = VERSION + (job.seed >= 2**32)  # in earlier versions, two of these seeds could give the same noise
    settings = {key: value for key, value in canonical(job, geometry).items() if key not in without}
    return digest([rules, with_paths_changed(settings, hash_of), dict(fingerprints)])[:32]


def canonical(job: Job, geometry: Geometry) -> dict[str, Any]:
    """Return a job's settings; those without effect on its pixels have their class's defaults.

    A job that cannot be made keeps its settings as they are.
    """
    try:
        passes = _resolved(job.passes(geometry))
    except PusaError:
        return _settings(job)
    if job.levels != SCHEDULE and _follows_schedule(job, passes[0]):
        job = job.model_copy(update={"levels": SCHEDULE})
        passes = _resolved(job.passes(geometry))
    job = job.model_copy(update=_unused(job, passes))
    for alternatives in _alternatives(job, passes, geometry):
        changed = (job.model_copy(update=dict(changes)) for changes in alternatives)
        job = next((other for other in changed if _passes(other, geometry) == passes), job)
    return _settings(job)


def _settings(job: Job) -> dict[str, Any]:
    """Return the settings that count. Those of `LATER` are left out where they are as before there were such keys."""
    settings = job.model_dump(exclude=set(NOT_OF_THE_VIDEO))
    return {key: value for key, value in settings.items() if key not in LATER or value != LATER[key]}


def _follows_schedule(job: Job, run: Pass) -> bool:
    """Return whether a job's levels are those that it would have without `levels`."""
    multipliers_F = torch.tensor(run.multipliers())
    levels_NF = levels_of(job, run, multipliers_F)
    usual_NF = levels_of(job, Pass(run.conditions, whole(len(multipliers_F))), multipliers_F)
    return torch.equal(levels_NF, usual_NF)


def _passes(job: Job, geometry: Geometry) -> list[Pass] | None:
    try:
        return _resolved(job.passes(geometry))
    except PusaError:
        return None


def _resolved(passes: Sequence[Pass]) -> list[Pass]:
    """Return the passes with conditions in the order of their places, which count from the start if they are legal."""

    def placed(condition: Condition, frames: int) -> Condition:
        return replace(condition, place=tuple(p % frames if -frames <= p < frames else p for p in condition.place))

    def ordered(run: Pass) -> list[Condition]:
        conditions = (placed(condition, len(run.timeline.starts)) for condition in run.conditions)
        return sorted(conditions, key=lambda condition: condition.place)

    return [replace(run, conditions=ordered(run)) for run in passes]


def _unused(job: Job, passes: Sequence[Pass]) -> dict[str, Any]:
    """Return the defaults of the keys of every task that have no effect in this job."""
    conditions = [condition for run in passes for condition in run.conditions]
    sources = [path for condition in conditions for path in (condition.source, condition.joined) if path is not None]
    unused = [key for key in ("prompt", "negative_prompt") if not getattr(job, key).strip()]
    unused += ["negative_prompt"] * (job.guidance == 1)
    unused += ["noise_schedule"] * (not isinstance(job.levels, str))
    unused += ["exact"] * (not any(map(pinned_indices, conditions)))
    if all(path.suffix == LATENTS_SUFFIX for path in sources):  # which have the job's size
        unused += ["fit", "background"]
    defaults = {key: field.default for key, field in Settings.model_fields.items()}
    if ImageColor.getrgb(job.background) == ImageColor.getrgb(defaults["background"]):
        unused.append("background")
    return {key: defaults[key] for key in unused}


def _alternatives(job: Job, passes: Sequence[Pass], geometry: Geometry) -> Iterator[Sequence[Changes]]:
    """Yield lists of other values of a task's own keys; of each list the first counts that changes no pass."""
    fields = type(job).model_fields
    defaults = {key: field.default for key, field in fields.items() if key not in Settings.model_fields}
    frames = geometry.latent_frames(job.num_frames)
    if isinstance(job, Keyframes):
        yield [_keyframes(job, frames)]
    if isinstance(job, ImageToVideo) and job.position:
        yield [{"position": _from_an_end(job.position, frames)}]
    if isinstance(job, Completion):
        yield [{"given": passes[0].conditions[0].take, "made": None}]
    for name in defaults.keys() & {"multiplier", "multipliers"}:
        usual = {key: defaults[key] for key in ("preset", name) if key in defaults}
        if any(getattr(job, key) != value for key, value in usual.items()):
            each = tuple(m + 0.0 for run in passes for c in run.conditions for m in c.multipliers)  # -0.0 becomes 0.0
            yield [usual, {**usual, name: each[0]}, {**usual, name: each}] if each else [usual]
    if isinstance(job, Segmented):
        yield [{"stagger": job.stagger and min(job.stagger, job.steps)}]
        yield [{"window": max(defaults["window"], job.num_frames)}, {"window": job.num_frames}]
        added = passes[0].timeline.starts.count(job.steps)  # latent frames of the second segment
        largest = geometry.latent_frames(job.window) - 1 - added
        yield [{"overlap": overlap} for overlap in (defaults["overlap"], 1, largest)]
    for key, default in defaults.items():
        if key not in ("id", "task") and not fields[key].is_required() and getattr(job, key) != default:
            yield [{key: default}]


def _keyframes(job: Keyframes, frames: int) -> Changes:
    """Return keyframes whose multipliers are written out where they are not those of the default preset."""
    usual = {"preset": type(job).model_fields["preset"].default}
    plain = {position: frame.model_copy(update={"multiplier": None}) for position, frame in job.frames.items()}
    presets = job.model_copy(update={**usual, "frames": plain}).conditions()
    written = {}
    for (position, frame), condition, preset in zip(plain.items(), job.conditions(), presets, strict=True):
        own = condition.multipliers[0] + 0.0  # -0.0 becomes 0.0
        multiplier = None if condition.multipliers == preset.multipliers else own
        written[_from_an_end(position, frames)] = frame.model_copy(update={"multiplier": multiplier})
    return {**usual, "frames": written}


def _from_an_end(position: int, frames: int) -> int:
    """Return a position as it is usually written: -1 for the last latent frame, others from the start."""
    if not -frames <= position < frames:
        return position
    return -1 if position % frames == frames - 1 > 0 else position % frames
