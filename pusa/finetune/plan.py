"""Plan the memory of a fine-tune without weights: what each process needs, and which settings would need less."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pusa.backbones import find_family
from pusa.backbones.base import TrainableTransformer, find_backbone
from pusa.backbones.context import MetaContext
from pusa.backbones.dry_run import GIB, FusedAttention, PeakMemory, empty
from pusa.errors import ConditionError, ManifestError
from pusa.finetune.loss import frame_errors
from pusa.finetune.matrix import count_measurements, count_passes
from pusa.finetune.sharding import FLOAT32, Sharding
from pusa.finetune.trainable import configure
from pusa.manifest.models import Bucket, FinetuneManifest
from pusa.manifest.training import Lora, Parallel
from pusa.weights.load import build, cast
from pusa.weights.resolve import locate_config


@dataclass(frozen=True)
class MemoryPlan:
    """The bytes that one process needs to train on clips of one shape.

    `weights`, `optimizer`, `average` and `gradients` are its shards of them, `gathered` the blocks that it has whole at
    the same time, `activations` the peak of what a step makes besides. Gradients appear while activations disappear, so
    `total`, the fullest moment, may be less than the sum.
    """

    shape: Bucket
    parameters: int
    trainable: int
    weights: int
    optimizer: int
    average: int
    gradients: int
    gathered: int
    activations: int
    total: int


def plan(manifest: FinetuneManifest, shape: Bucket, compute: torch.dtype) -> MemoryPlan:
    """Run a step on the meta device with clips of one shape, computing in `compute`, and count its memory.

    From a hub only configurations are downloaded.

    Raises:
        ManifestError: the batch, or the frames of a clip, cannot be divided among the processes.
        ConditionError: the model does not take clips of that shape, or its heads cannot be divided.
        TrainingError: `manifest.train` names parameters that do not exist.
        WeightsError: a part of the model is missing.
    """
    backbone = find_backbone(manifest.base.backbone)
    backbone.geometry.check(shape.width, shape.height, shape.num_frames)
    for problem in division_problems(manifest, backbone.geometry.latent_frames(shape.num_frames)):
        raise ManifestError(problem)

    transformer = empty_transformer(manifest)  # as the process with the most frames sees it
    configure(transformer, manifest, MetaContext(0, manifest.parallel.context, None), _checkpoint_block)
    cast(transformer.train(), compute)
    sizes = [(weight.numel(), weight.nbytes, weight.requires_grad) for weight in transformer.parameters()]
    trainable = sum(count for count, _, requires_grad in sizes if requires_grad)
    frozen_bytes = sum(size for _, size, requires_grad in sizes if not requires_grad)
    processes = manifest.parallel.processes
    shard = FLOAT32 * trainable // processes
    weights = shard + frozen_bytes // processes
    average = shard if manifest.ema_decay else 0

    memory = PeakMemory()
    share, clips = clips_per_process(manifest)
    sharding = Sharding(transformer, processes, accumulates=share > clips, memory=memory)
    with FusedAttention(), memory:
        latents = (clips, *backbone.geometry.latent_shape(shape.width, shape.height, shape.num_frames))
        noisy, target, sigma_BF = empty(*latents), empty(*latents), empty(clips, latents[2])
        text = backbone.longest_text(transformer, clips)
        frame_errors(backbone.predict(transformer, noisy, sigma_BF, text), target).mean().backward()
    return MemoryPlan(
        shape=shape,
        parameters=sum(count for count, _, _ in sizes),
        trainable=trainable,
        weights=weights,
        optimizer=2 * shard,
        average=average,
        gradients=shard,
        gathered=sharding.gathered,
        activations=memory.peak,
        total=weights + 2 * shard + average + memory.total,
    )


def division_problems(manifest: FinetuneManifest, latent_frames: int | None) -> Iterator[str]:
    """Yield what cannot be divided evenly among the processes, and what could.

    Args:
        manifest: the recipe.
        latent_frames: of the shortest clips; None where they are not known.
    """
    processes, context = manifest.parallel.processes, manifest.parallel.context
    if processes % context:
        yield f"parallel.context is {context}; it must divide the {processes} processes"
    if latent_frames is not None and context > latent_frames:
        yield f"parallel.context is {context}; clips of {latent_frames} latent frames allow no more"
    if processes % context == 0 and manifest.batch_size % (processes // context):
        yield (
            f"batch_size is {manifest.batch_size}; it must be a multiple of {processes // context}, "
            f"since {processes} processes with parallel.context {context} share it"
        )


def legal_contexts(manifest: FinetuneManifest, latent_frames: int) -> list[int]:
    """Return the values of parallel.context that suit the processes, the heads and clips of `latent_frames`."""
    transformer: TrainableTransformer = empty_transformer(manifest)
    processes, legal = manifest.parallel.processes, []
    for size in range(1, min(processes, latent_frames) + 1):
        if processes % size == 0:
            try:
                transformer.share_frames(MetaContext(0, size, None))
            except ConditionError:  # the heads cannot be divided
                continue
            legal.append(size)
    return legal


def empty_transformer(manifest: FinetuneManifest) -> Any:
    """Return the base's transformer to train on the meta device. From a hub only its configuration is downloaded.

    Raises:
        WeightsError: it is missing.
    """
    return build(find_backbone(manifest.base.backbone), locate_config(manifest.base, manifest.part))


def clips_per_process(manifest: FinetuneManifest) -> tuple[int, int]:
    """Return a process's clips of a batch, and how many of them make one micro-batch."""
    share = manifest.batch_size * manifest.parallel.context // manifest.parallel.processes
    return share, min(share, manifest.micro_batch_size or share)


def _checkpoint_block(block: nn.Module, *inputs: Any) -> Any:
    """Run a block with activation checkpointing. torch recomputes it outside the dry run's mode, so set that again."""
    return checkpoint(block, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), FusedAttention()))


# The report

PARTS = {
    "weights": "trainable ones in float32, frozen ones in the dtype of the arithmetic",
    "optimizer": "AdamW's two moments",
    "average": "moving average of the weights",
    "gradients": "in float32; they appear as activations disappear, so a total may be less than the sum",
    "gathered": "blocks at work, gathered from all processes",
}
PASSES_OF_A_STEP = 3  # the work of a clip in a step, in forward passes: the backward pass is about two
MULTIPLES = (2, 4)  # of the processes, or of those that share a clip, in alternatives


def report(manifest: FinetuneManifest, shapes: Sequence[Bucket], compute: torch.dtype, memory: int) -> Iterator[str]:
    """Yield lines: what clips of each shape need of a device with `memory` bytes, and which settings would need less.

    Raises:
        PusaError: as `plan`.
    """
    plans = (plan(manifest, shape, compute) for shape in shapes)
    fullest: MemoryPlan | None = None
    for need in plans:
        if fullest is None:
            yield from _heading(manifest, need, compute)
        yield f"{_size(need.shape):<16}{need.activations / GIB:>12.3f}{_verdict(need, memory)}"
        fullest = max(fullest or need, need, key=lambda need: need.total)
    assert fullest is not None, "a table has rows"
    geometry = find_family(manifest.base.backbone).geometry
    latent_frames = geometry.latent_frames(min(shape.num_frames for shape in shapes))
    contexts = ", ".join(map(str, legal_contexts(manifest, latent_frames)))
    yield f"parallel.context may be {contexts} with {manifest.parallel.processes} processes"
    if fullest.total > memory:
        yield f"What may be set instead, for {_size(fullest.shape)}:"
        others = {_describe_change(manifest, other): other for other in alternatives(manifest)}
        for change, other in others.items():
            if not change:
                continue
            try:
                need = plan(other, fullest.shape, compute)
            except (ManifestError, ConditionError):  # not possible, so not an alternative
                continue
            yield f"{_verdict(need, memory)}  {change}"
    yield from _measuring(manifest, [geometry.latent_frames(shape.num_frames) for shape in shapes])
    yield "These bytes are counted, not measured: workspaces of kernels and the allocator's reserve come on top."


def _measuring(manifest: FinetuneManifest, latent_frames: Sequence[int]) -> Iterator[str]:
    """Yield a line on the work of measuring held-out clips, if that is asked for: at most, since they may be fewer."""
    validation = manifest.validation
    if validation is None or not validation.every:
        return
    patterns, levels = max(count_passes(validation, manifest.level_range, frames) for frames in latent_frames)
    passes, times = validation.matrix_clips * patterns * levels, count_measurements(manifest.steps, validation.every)
    share = passes * times / (manifest.steps * manifest.batch_size * PASSES_OF_A_STEP)
    yield (
        f"Held-out clips: {times} measurements of at most {validation.matrix_clips} clips x {patterns} patterns x "
        f"{levels} levels = {passes:,} forward passes, {share:.1%} of the training's own work"
    )


def alternatives(manifest: FinetuneManifest) -> Iterator[FinetuneManifest]:
    """Yield manifests that need less memory; the third and later ones include the changes of the first two.

    Some may not be possible.
    """
    yield manifest.model_copy(update={"activation_checkpointing": 1})
    least = manifest.model_copy(update={"activation_checkpointing": 1, "micro_batch_size": 1})
    yield least
    processes, context = manifest.parallel.processes, manifest.parallel.context
    shares = [(processes, context * n) for n in MULTIPLES]
    shares += [(processes * n, context) for n in MULTIPLES]
    shares += [(processes * n, context * n) for n in MULTIPLES]
    for processes, context in shares:
        parallel = Parallel.model_construct(processes=processes, context=context)
        yield least.model_copy(update={"parallel": parallel})
    if not isinstance(manifest.train, Lora):
        yield least.model_copy(update={"train": Lora(method="lora")})


def _heading(manifest: FinetuneManifest, need: MemoryPlan, compute: torch.dtype) -> Iterator[str]:
    processes, context = manifest.parallel.processes, manifest.parallel.context
    share, clips = clips_per_process(manifest)
    every = manifest.activation_checkpointing
    checkpointing = f"activation_checkpointing {every}" if every else "no activation_checkpointing"
    yield (
        f"{manifest.base.weights}: {manifest.train.method}, {str(compute).removeprefix('torch.')}, {checkpointing}; "
        f"{_processes(processes)}, {context} per clip, {share} clips per step each, {clips} at a time"
    )
    yield f"{need.parameters:,} parameters, {need.trainable:,} trainable; GiB of each process:"
    for part, description in PARTS.items():
        if size := getattr(need, part):
            yield f"  {part:<14}{size / GIB:>9.3f}  {description}"
    yield f"{'clips':<16}{'activations':>12}{'total':>9}"


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def _describe_change(manifest: FinetuneManifest, other: FinetuneManifest) -> str:
    """Describe how another manifest differs, in the words of a manifest or of the command line; "" where it does not.

    A micro_batch_size counts only where a process has more than one clip.
    """
    before, after = manifest.parallel, other.parallel
    is_smaller = other.micro_batch_size != manifest.micro_batch_size and clips_per_process(other)[0] > 1
    changes = {
        "activation_checkpointing: 1": other.activation_checkpointing != manifest.activation_checkpointing,
        "micro_batch_size: 1": is_smaller,
        f"train: {other.train.method}": other.train != manifest.train,
        f"parallel.context: {after.context}": after.context != before.context,
        _processes(after.processes): after.processes != before.processes,
    }
    return ", ".join(text for text, changed in changes.items() if changed)


def _verdict(need: MemoryPlan, memory: int) -> str:
    fits = "fits" if need.total <= memory else "does NOT fit"
    return f"{need.total / GIB:>9.3f}  {fits} into {memory / GIB:.1f}"


def _size(shape: Bucket) -> str:
    return f"{shape.width}x{shape.height}x{shape.num_frames}"
