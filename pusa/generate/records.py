"""Collect what a record says about how a video was made, beside its settings: model, levels, versions, times, place."""

import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import version
from socket import gethostname
from typing import Any

import imageio_ffmpeg
import torch

from pusa.backbones.family import Geometry
from pusa.diffusion.courses import SCHEDULE
from pusa.diffusion.noise_schedules import find_noise_schedule
from pusa.generate.outputs import with_paths_changed
from pusa.generate.sampling import levels_of
from pusa.manifest.models import ModelSpec
from pusa.tasks.base import Job, resolve_positions
from pusa.weights.model import Model, device_name

PACKAGES = ("pusa", "torch", "diffusers", "transformers")


def describe_making(job: Job, model: Model, slot: str) -> dict[str, Any]:
    """Return facts about a video that is being made now in a slot, as JSON values.

    Returns:
        `model`, as a manifest has it; `levels` of `describe_levels`; `lineage`, by part: what the files of its weights
        record about themselves; `versions`; `made_by`, host and slot; `device`; `made_at`, the time in UTC.
    """
    host = gethostname()
    return {
        "model": describe_model(model.spec),
        "levels": describe_levels(job, model.backbone.geometry),
        "lineage": model.lineage,
        "versions": versions(),
        "made_by": slot if host in slot else f"{host} {slot}",
        "device": device_name(model.device),
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def describe_model(spec: ModelSpec) -> dict[str, Any]:
    """Return a model as a manifest has it: the keys that are set, as JSON values."""
    described: dict[str, Any] = with_paths_changed(spec.model_dump(exclude_defaults=True), str)
    return {"backbone": spec.backbone, **described}


def describe_levels(job: Job, geometry: Geometry) -> dict[str, Any]:
    """Return how noisy latent frames are in the last pass of a job.

    Returns:
        `given`: the multiplier of each given latent frame, by its number; `from_pass_before`: the numbers of those that
        the pass before made, of no source; `starts`: the step at which each latent frame begins to be denoised;
        `schedule`: the steps + 1 levels from there on of a frame of multiplier 1. Of a job with `levels` also these, as
        `course`, and `matrix`: the levels of each latent frame before each step and after the last; a job with a matrix
        has no `schedule`.
    """
    run = job.passes(geometry)[-1]
    frames = len(run.timeline.starts)
    given: dict[int, float] = {}
    made_before: set[int] = set()
    for condition in run.conditions:
        places = resolve_positions(condition.place, frames, "position")
        given |= zip(places, condition.multipliers, strict=True)
        made_before |= set(places if condition.source is None else ())
    described: dict[str, Any] = {
        "given": {str(place): given[place] for place in sorted(given)},
        "from_pass_before": sorted(made_before),
        "starts": list(run.timeline.starts),
    }
    if isinstance(job.levels, str):
        schedule_N = find_noise_schedule(job.noise_schedule)(job.steps, torch.ones(1))[:, 0]
        described["schedule"] = [round(level, 6) for level in schedule_N.tolist()]
    if job.levels != SCHEDULE:
        levels_NF = levels_of(job, run, torch.tensor(run.multipliers()))
        described["course"] = job.levels if isinstance(job.levels, str) else "matrix"
        described["matrix"] = [[round(level, 6) for level in row] for row in levels_NF.tolist()]
    return described


@lru_cache(maxsize=1)
def versions() -> Mapping[str, str]:
    """Return the versions of what makes videos."""
    packages = {name: version(name) for name in PACKAGES}
    return {**packages, "ffmpeg": imageio_ffmpeg.get_ffmpeg_version(), "python": platform.python_version()}


def describe_seconds(**phases: float | None) -> dict[str, float]:
    """Return how long the phases of a job took; those that an earlier run made, None, are left out."""
    return {name: round(seconds, 3) for name, seconds in phases.items() if seconds is not None}
