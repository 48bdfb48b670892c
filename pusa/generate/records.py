"""Collect what a record, and the video itself, say about how it was made: model, levels, versions, times, place."""

import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from socket import gethostname
from typing import Any

import imageio_ffmpeg
import torch

from pusa.backbones.family import Geometry
from pusa.diffusion.courses import SCHEDULE
from pusa.diffusion.noise_schedules import find_noise_schedule
from pusa.generate.canonical import NOT_OF_THE_VIDEO
from pusa.generate.outputs import with_paths_changed
from pusa.generate.sampling import Prepared, levels_of
from pusa.manifest.models import ModelSpec
from pusa.system.files import parse_json
from pusa.tasks.base import Job, resolve_positions
from pusa.video.provenance import Provenance
from pusa.weights.hub import HUB_PREFIX
from pusa.weights.model import Model, device_name

PACKAGES = ("pusa", "torch", "diffusers", "transformers")
FORMAT = 1  # of what a video holds
SAMPLED = "sampled"  # the key of `describe_sampling` in the facts of latents
LOCAL = "local:"  # before the name of a file or folder of weights, in a video: no path of a machine is in there
# The keys of a model that name weights.
MODEL_NAMES = frozenset({"weights", "checkpoint", "lora", "text_encoder", "vae", "high", "low"})


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


def describe_provenance(
    job: Job, key: str, model: Model, fingerprints: Mapping[str, str], hash_of: Callable[[Path], str], sampled: str = ""
) -> Provenance:
    """Return what a job's video says about itself: without times, and without paths or names of a machine.

    Args:
        job: the job. With `embed: none`, neither its prompt nor any of the facts are in there.
        key: the video's key.
        model: the model that decodes it.
        fingerprints: of the weights, as they are part of the key.
        hash_of: hashes an input.
        sampled: `describe_sampling`, of the process that sampled it; "" if this is not known.
    """
    if job.embed == "none":
        return describe_briefly(job)
    known = parse_json(sampled.encode())
    settings = job.model_dump(exclude=set(NOT_OF_THE_VIDEO - {"id"}))  # the bytes do not depend on them
    facts = {
        "format": FORMAT,
        "key": key,
        "job": with_paths_changed(settings, lambda path: {"file": path.name, "sha256": hash_of(path)}),
        "model": with_names_changed(describe_model(model.spec), _without_folder),
        "weights": dict(fingerprints),
        **(known if isinstance(known, dict) else {"batch": None, **describe_environment(model)}),
        "cores": len(os.sched_getaffinity(0)),  # the encoder's result depends on their number
    }
    return replace(describe_briefly(job), facts=facts)


def describe_briefly(job: Job) -> Provenance:
    """Return what the video of a draft says about itself: that a model made it, and unless `embed: none` the prompt."""
    return Provenance(job.id, "" if job.embed == "none" else job.prompt, f"pusa {version('pusa')}")


def describe_sampling(company: Sequence[Prepared], model: Model) -> list[str]:
    """Return for each job of a batch, as JSON, what decides the last bits of its latents, beside its settings.

    `batch` has the job's `position`, and for each job the number of `tokens` of its prompt and its negative prompt:
    with the same shapes, a kernel computes the same bits for a row, whatever is in the others.
    """
    tokens = [[int(text.mask.sum()) if text else 0 for text in (one.text, one.null)] for one in company]
    environment = describe_environment(model)
    return [
        json.dumps({"batch": {"position": position, "tokens": tokens}, **environment}, sort_keys=True)
        for position in range(len(company))
    ]


def describe_environment(model: Model) -> dict[str, Any]:
    """Return the `packages` with their versions, the `device`, and the settings of its `kernels`, which decide bits."""
    kernels: dict[str, Any] = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul_precision": torch.get_float32_matmul_precision(),
    }
    if model.device.type == "cuda":
        kernels |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    else:
        kernels |= {"instructions": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
    return {"packages": dict(versions()), "device": device_name(model.device), "kernels": kernels}


def with_names_changed(model: Any, change: Callable[[str], str]) -> Any:
    """Return a manifest's `model:` as JSON values with the name of each of its weights replaced by `change` of it."""
    if isinstance(model, dict):
        return {
            key: change(value) if key in MODEL_NAMES and isinstance(value, str) else with_names_changed(value, change)
            for key, value in model.items()
        }
    return [with_names_changed(value, change) for value in model] if isinstance(model, list | tuple) else model


def _without_folder(name: str) -> str:
    return name if name.startswith(("builtin:", HUB_PREFIX)) else LOCAL + Path(name).name


@lru_cache(maxsize=1)
def versions() -> Mapping[str, str]:
    """Return the versions of what makes videos."""
    packages = {name: version(name) for name in PACKAGES}
    return {**packages, "ffmpeg": imageio_ffmpeg.get_ffmpeg_version(), "python": platform.python_version()}


def describe_seconds(**phases: float | None) -> dict[str, float]:
    """Return how long the phases of a job took; those that an earlier run made, None, are left out."""
    return {name: round(seconds, 3) for name, seconds in phases.items() if seconds is not None}
