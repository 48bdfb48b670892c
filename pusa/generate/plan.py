"""Estimate the memory that jobs need, by a dry run on torch's meta device, which has shapes and no values.

The dry run makes the calls that generation makes of the transformer and the VAE, and counts every tensor. It leaves
out the text encoder's tensors for one prompt, the workspaces of kernels, and memory that an allocator keeps.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from pusa.backbones.base import Backbone, find_backbone
from pusa.backbones.dry_run import GIB, FusedAttention, PeakMemory, empty
from pusa.backbones.family import Geometry
from pusa.generate.latents import LATENTS_SUFFIX
from pusa.manifest.models import GenerateManifest
from pusa.tasks.base import Condition, Job, Pass
from pusa.weights.load import build, cast
from pusa.weights.model import part_dtype
from pusa.weights.resolve import locate_config

STEADY = 3  # chunks of a video after which decoding needs no more memory
EVEN = (3, 4)  # chunks, from the first number of which on encoding needs as much more memory for each more


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
    text_encoders: tuple[str, ...]  # the parts that are on the device together

    @property
    def all_on_device(self) -> int:
        """Return the bytes needed with every part on the device."""
        return sum(part.weights for part in self.parts) + max(part.working for part in self.parts)

    @property
    def one_at_a_time(self) -> int:
        """Return the bytes needed with one part, or all text encoders, on the device (`offload: true`)."""
        texts = sum(part.weights for part in self.parts if part.part in self.text_encoders)
        return max(texts, *(part.weights + part.working for part in self.parts))

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
        cast(module, part_dtype(manifest.model, part, dtype))
        modules[part] = module
        tensors = [*module.parameters(), *module.buffers()]
        parts[part] = PartMemory(part, sum(t.numel() for t in tensors), sum(t.nbytes for t in tensors))
    for part, job, peak in _largest_peaks(backbone, modules, [Cost.of(job, geometry) for job in manifest.jobs]):
        if peak > parts[part].working:
            size = f"{job.id}: {job.width}x{job.height}, {job.num_frames} frames"
            parts[part] = replace(parts[part], working=peak, job=size)
    return Plan(tuple(parts.values()), family.text_encoders)


@dataclass(frozen=True, eq=False)
class Cost:
    """What the memory of a job depends on: latent frames that the transformer sees, and frames that are encoded."""

    job: Job
    seen: int
    encoded: int

    @classmethod
    def of(cls, job: Job, geometry: Geometry) -> "Cost":
        """Return the cost of a job."""
        passes = job.passes(geometry)
        return cls(job, _most_frames_seen(passes), _most_frames_encoded(passes, job, geometry))

    def latents(self, geometry: Geometry) -> Tensor:
        """Return latents (1, C, F, h, w) as they are decoded, on the meta device."""
        channels, frames, height, width = geometry.latent_shape(self.job.width, self.job.height, self.job.num_frames)
        return empty(1, channels, 2 * (frames - 1) if self.job.cyclic else frames, height, width)

    @property
    def pixels(self) -> int:
        """Return the pixels of a frame."""
        return self.job.width * self.job.height

    @property
    def batch(self) -> int:
        """Return how many samples the transformer sees: two with guidance."""
        return 1 if self.job.guidance == 1 else 2


def _largest_peaks(
    backbone: Backbone, modules: dict[str, Any], costs: Sequence[Cost]
) -> Iterator[tuple[str, Job, int]]:
    """Yield a part, a job and the peak of the part's memory in bytes, for the jobs that may need the most memory."""
    geometry = backbone.geometry
    # One sample of many tokens may need less than two of few, which have a text each.
    for largest in {cost.batch: cost for cost in sorted(costs, key=lambda cost: cost.seen * cost.pixels)}.values():
        channels, _, height, width = largest.latents(geometry).shape[1:]
        z, sigma_BF = empty(largest.batch, channels, largest.seen, height, width), empty(largest.batch, largest.seen)
        for transformer in backbone.family.transformers:
            module = modules[transformer]
            text = backbone.longest_text(module, largest.batch)
            yield transformer, largest.job, _peak(partial(backbone.predict, module, z, sigma_BF, text))

    def decoded_at_once(cost: Cost) -> int:
        width, height = (min(side, backbone.own_tile or side) for side in (cost.job.width, cost.job.height))
        return backbone.frames_at_once(cost.latents(geometry)) * width * height

    # The most pixels at once need the most memory, or those of the largest frames, of which some are kept.
    for largest in {max(costs, key=decoded_at_once), max(costs, key=lambda cost: cost.pixels)}:
        chunks = backbone.decode_video(modules["vae"], largest.latents(geometry))
        yield "vae", largest.job, _peak(partial(deque, islice(chunks, STEADY), maxlen=0))
    largest = max(costs, key=lambda cost: cost.encoded * cost.pixels)
    if largest.encoded:
        yield "vae", largest.job, _encoding_peak(backbone, modules["vae"], largest)


def _encoding_peak(backbone: Backbone, vae: Any, cost: Cost) -> int:
    """Return the peak of encoding, which grows evenly with the chunks: for many, it follows from those of fewer."""

    def peak(frames: int) -> int:
        return _peak(partial(backbone.encode_video, vae, empty(1, 3, frames, cost.job.height, cost.job.width)))

    at_once = backbone.frames_at_once(cost.latents(backbone.geometry))
    few, more = (backbone.geometry.num_frames(chunks * at_once) for chunks in EVEN)
    if cost.encoded <= more:
        return peak(cost.encoded)
    return peak(more) + (peak(more) - peak(few)) * (cost.encoded - more) // (more - few)


def _peak(call: Callable[[], Any]) -> int:
    """Return the most bytes that the tensors of a call on the meta device have together."""
    with torch.no_grad(), FusedAttention(), PeakMemory() as memory:
        call()
    return memory.peak


def _most_frames_seen(passes: Sequence[Pass]) -> int:
    """Return the most latent frames that the transformer sees at once."""
    return max(len(window) for run in passes for window in run.timeline.windows(0))


def _most_frames_encoded(passes: Sequence[Pass], job: Job, geometry: Geometry) -> int:
    """Return the most frames that the VAE encodes at once, 0 if it encodes none."""

    def encoded(condition: Condition) -> int:
        if condition.source is None or condition.source.suffix == LATENTS_SUFFIX:
            return 0
        if condition.still:
            return 1
        if condition.joined or condition.from_end or min(condition.take) < 0:
            return job.num_frames
        return geometry.num_frames(max(condition.take) + 1)

    return max((encoded(condition) for run in passes for condition in run.conditions), default=0)
