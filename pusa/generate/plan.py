"""What jobs need before anything is loaded: a dry run on torch's meta device, which has shapes and no numbers.

The very calls that generation makes of its two large parts are made, and every tensor that comes and goes is counted.
Not counted: what the text encoder holds for one prompt, workspaces of kernels, and what an allocator keeps.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pusa.backbones.base import Backbone, find_backbone
from pusa.backbones.dry_run import GIB, FusedAttention, PeakMemory, empty
from pusa.backbones.family import Geometry
from pusa.generate.conditions import LATENTS_SUFFIX
from pusa.manifest.models import GenerateManifest
from pusa.tasks.base import Condition, Job
from pusa.weights.load import build
from pusa.weights.resolve import locate_config


@dataclass(frozen=True)
class Need:
    """What one part needs: bytes of its weights, and the most that it holds beside them, for the largest job."""

    part: str
    parameters: int
    weights: int
    working: int = 0
    job: str = ""


@dataclass(frozen=True)
class Plan:
    """The needs of every part, in bytes."""

    needs: tuple[Need, ...]

    @property
    def together(self) -> int:
        """With every part on the device."""
        return sum(need.weights for need in self.needs) + max(need.working for need in self.needs)

    @property
    def offloaded(self) -> int:
        """With one part at a time on the device (`offload: true`)."""
        return max(need.weights + need.working for need in self.needs)

    def table(self, memory: int, offload: bool) -> str:
        """For people: the needs, and whether they fit into `memory` bytes."""
        rows = [f"{'part':<14}{'parameters':>16}{'weights GiB':>13}{'working GiB':>13}  largest job"]
        for need in self.needs:
            working = f"{need.working / GIB:.3f}" if need.working else "-"
            sizes = f"{need.parameters:>16,}{need.weights / GIB:>13.3f}{working:>13}"
            rows.append(f"{need.part:<14}{sizes}  {need.job}".rstrip())
        for name, size, chosen in (
            ("all parts on the device", self.together, not offload),
            ("one part at a time (offload: true)", self.offloaded, offload),
        ):
            fits = "fits" if size <= memory else "does NOT fit"
            rows.append(f"{name}: {size / GIB:.2f} GiB, {fits} into {memory / GIB:.1f}{' <- asked for' * chosen}")
        return "\n".join(rows)


def plan(manifest: GenerateManifest, dtype: torch.dtype) -> Plan:
    """What the manifest's jobs need, with weights of `dtype`. Of a model on a hub only configurations are downloaded.

    Raises:
        WeightsError: a part of the model is not there.
    """
    backbone = find_backbone(manifest.model.backbone)
    family = backbone.family
    networks = (*family.text_encoders, *family.transformers, *family.vaes)
    modules = {part: _part(backbone, manifest, part, dtype) for part in networks}
    needs = {part: Need(part, *_size(module)) for part, module in modules.items()}
    for job in {_shape(job, backbone.geometry): job for job in manifest.jobs}.values():
        for part, run in _runs(backbone, modules, job):
            peak = _peak(run)
            if peak > needs[part].working:
                size = f"{job.id}: {job.width}x{job.height}, {job.num_frames} frames"
                needs[part] = Need(part, needs[part].parameters, needs[part].weights, peak, size)
    return Plan(tuple(needs.values()))


def _part(backbone: Backbone, manifest: GenerateManifest, part: str, dtype: torch.dtype) -> Any:
    source = locate_config(manifest.model, part)
    module = build(backbone.classes[part], source).eval().requires_grad_(False)
    return nn.Module.to(module, dtype)  # diffusers' own warns of what means nothing here


def _size(module: nn.Module) -> tuple[int, int]:
    weights = list(module.parameters()) + list(module.buffers())
    return sum(w.numel() for w in weights), sum(w.nbytes for w in weights)


def _shape(job: Job, geometry: Geometry) -> tuple[Any, ...]:
    return (
        job.task,
        job.width,
        job.height,
        job.num_frames,
        job.guidance == 1,
        _seen(job, geometry),
        _encoded(job, geometry),
    )


def _runs(backbone: Backbone, modules: dict[str, Any], job: Job) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The network's largest calls for one job."""
    batch = 1 if job.guidance == 1 else 2
    channels, frames, height, width = backbone.geometry.latent_shape(job.width, job.height, job.num_frames)
    text = backbone.longest_text(modules["transformer"], batch)
    seen = _seen(job, backbone.geometry)
    z, sigma_BF = empty(batch, channels, seen, height, width), empty(batch, seen)
    yield "transformer", lambda: backbone.predict(modules["transformer"], z, sigma_BF, text)
    decoded = empty(1, channels, 2 * (frames - 1) if job.cyclic else frames, height, width)
    yield "vae", lambda: backbone.decode_video(modules["vae"], decoded)
    if encoded := _encoded(job, backbone.geometry):
        pixels = empty(1, 3, encoded, job.height, job.width)
        yield "vae", lambda: backbone.encode_video(modules["vae"], pixels)


def _seen(job: Job, geometry: Geometry) -> int:
    """The most latent frames that the transformer is shown at once."""
    courses = [run.timeline for run in job.passes(geometry)]
    return max(len(window) for timeline in courses for window in timeline.windows(0))


def _encoded(job: Job, geometry: Geometry) -> int:
    """The most frames that the VAE is given at once."""
    return max((_frames_of(c, job, geometry) for run in job.passes(geometry) for c in run.conditions), default=0)


def _frames_of(condition: Condition, job: Job, geometry: Geometry) -> int:
    if condition.source is None or condition.source.suffix == LATENTS_SUFFIX:
        return 0
    if condition.still:
        return 1
    if condition.joined or condition.from_end or min(condition.take) < 0:
        return job.num_frames
    return geometry.num_frames(max(condition.take) + 1)


def _peak(run: Callable[[], Any]) -> int:
    with torch.no_grad(), FusedAttention(), PeakMemory() as memory:
        run()
    return memory.peak
