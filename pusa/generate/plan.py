"""Estimate the memory that jobs need, by a dry run on torch's meta device, which has shapes and no values.

The dry run makes the calls that generation makes of the transformer and the VAE, and counts every tensor. It leaves
out the text encoder's tensors for one prompt, the workspaces of kernels, and memory that an allocator keeps.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from pusa.backbones.base import Backbone, find_backbone
from pusa.backbones.dry_run import GIB, FusedAttention, PeakMemory, empty
from pusa.backbones.family import Geometry
from pusa.generate.latents import LATENTS_SUFFIX
from pusa.manifest.models import GenerateManifest
from pusa.tasks.base import Condition, Job
from pusa.weights.load import build
from pusa.weights.resolve import locate_config


@dataclass(frozen=True)
class PartMemory:
    """The memory of one part in bytes: its weights, and the peak of its other tensors in the largest job."""

    part: str
    parameters: int
    weights: int
    working: int = 0
    job: str = ""  # the largest job, with its size


@dataclass(frozen=True)
class Plan:
    """The memory of every part that has weights."""

    parts: tuple[PartMemory, ...]

    @property
    def all_on_device(self) -> int:
        """Return the bytes needed with every part on the device."""
        return sum(part.weights for part in self.parts) + max(part.working for part in self.parts)

    @property
    def one_at_a_time(self) -> int:
        """Return the bytes needed with one part at a time on the device (`offload: true`)."""
        return max(part.weights + part.working for part in self.parts)

    def table(self, memory: int, offload: bool) -> str:
        """Return a table of the parts, and whether they fit into `memory` bytes; `offload` is the manifest's choice."""
        rows = [f"{'part':<14}{'parameters':>16}{'weights GiB':>13}{'working GiB':>13}  largest job"]
        for part in self.parts:
            working = f"{part.working / GIB:.3f}" if part.working else "-"
            sizes = f"{part.parameters:>16,}{part.weights / GIB:>13.3f}{working:>13}"
            rows.append(f"{part.part:<14}{sizes}  {part.job}".rstrip())
        for name, size, chosen in (
            ("all parts on the device", self.all_on_device, not offload),
            ("one part at a time (offload: true)", self.one_at_a_time, offload),
        ):
            fits = "fits" if size <= memory else "does NOT fit"
            note = " <- this manifest" if chosen else ""
            rows.append(f"{name}: {size / GIB:.2f} GiB, {fits} into {memory / GIB:.1f} GiB{note}")
        return "\n".join(rows)


def plan(manifest: GenerateManifest, dtype: torch.dtype) -> Plan:
    """Return the memory that a manifest's jobs need with weights of `dtype`.

    Of a model on a hub, only the configuration files are downloaded.

    Raises:
        WeightsError: a part of the model is missing.
    """
    backbone = find_backbone(manifest.model.backbone)
    family, geometry = backbone.family, backbone.geometry
    modules, parts = {}, {}
    for part in (*family.text_encoders, *family.transformers, *family.vaes):
        module = build(backbone, locate_config(manifest.model, part)).eval().requires_grad_(False)
        modules[part] = nn.Module.to(module, dtype)  # diffusers' own `to` would warn about dtypes
        tensors = [*module.parameters(), *module.buffers()]
        parts[part] = PartMemory(part, sum(t.numel() for t in tensors), sum(t.nbytes for t in tensors))
    for job in {_cost_key(job, geometry): job for job in manifest.jobs}.values():
        for part, call in _largest_calls(backbone, modules, job):
            with torch.no_grad(), FusedAttention(), PeakMemory() as memory:
                call()
            if memory.peak > parts[part].working:
                size = f"{job.id}: {job.width}x{job.height}, {job.num_frames} frames"
                parts[part] = PartMemory(part, parts[part].parameters, parts[part].weights, memory.peak, size)
    return Plan(tuple(parts.values()))


def _cost_key(job: Job, geometry: Geometry) -> tuple[Any, ...]:
    """Return everything that the memory of a job depends on, so that equal jobs are tried once."""
    seen, encoded = _most_frames_seen(job, geometry), _most_frames_encoded(job, geometry)
    return job.task, job.width, job.height, job.num_frames, job.guidance == 1, seen, encoded


def _largest_calls(backbone: Backbone, modules: dict[str, Any], job: Job) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the calls of a job that need the most memory, each with the part that it calls."""
    geometry, batch = backbone.geometry, 1 if job.guidance == 1 else 2
    channels, frames, height, width = geometry.latent_shape(job.width, job.height, job.num_frames)
    seen = _most_frames_seen(job, geometry)
    z, sigma_BF = empty(batch, channels, seen, height, width), empty(batch, seen)
    for transformer in backbone.family.transformers:
        module = modules[transformer]
        text = backbone.longest_text(module, batch)
        yield transformer, partial(backbone.predict, module, z, sigma_BF, text)
    decoded = empty(1, channels, 2 * (frames - 1) if job.cyclic else frames, height, width)
    yield "vae", lambda: deque(backbone.decode_video(modules["vae"], decoded), maxlen=0)  # chunk by chunk, none is kept
    if encoded := _most_frames_encoded(job, geometry):
        pixels = empty(1, 3, encoded, job.height, job.width)
        yield "vae", partial(backbone.encode_video, modules["vae"], pixels)


def _most_frames_seen(job: Job, geometry: Geometry) -> int:
    """Return the most latent frames that the transformer sees at once."""
    return max(len(window) for run in job.passes(geometry) for window in run.timeline.windows(0))


def _most_frames_encoded(job: Job, geometry: Geometry) -> int:
    """Return the most frames that the VAE encodes at once, 0 if it encodes none."""

    def encoded(condition: Condition) -> int:
        if condition.source is None or condition.source.suffix == LATENTS_SUFFIX:
            return 0
        if condition.still:
            return 1
        if condition.joined or condition.from_end or min(condition.take) < 0:
            return job.num_frames
        return geometry.num_frames(max(condition.take) + 1)

    return max((encoded(condition) for run in job.passes(geometry) for condition in run.conditions), default=0)
