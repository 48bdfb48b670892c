"""What the plan of a fine-tune says to people: what each process needs, and where that is too much, what would fit."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pusa.backbones import find_family
from pusa.backbones.base import Backbone, find_backbone
from pusa.backbones.context import Imagined
from pusa.backbones.dry_run import GIB, FusedAttention, PeakMemory, empty
from pusa.errors import ConditionError, ManifestError
from pusa.finetune.loss import frame_errors
from pusa.finetune.sharding import FLOAT32, Sharding
from pusa.finetune.trainable import choose
from pusa.manifest.models import Bucket, FinetuneManifest
from pusa.manifest.training import Lora, Parallel
from pusa.weights.load import build
from pusa.weights.resolve import locate_config


@dataclass(frozen=True)
class Need:
    """Bytes that one process needs for clips of one shape.

    `weights`, `optimizer`, `average` and `gradients` are its parts of them, `whole` the blocks that it has whole at a
    time, `activations` the most that a step makes beside. Gradients come as activations go, so `total`, the fullest
    moment, may be less than their sum.
    """

    shape: Bucket
    parameters: int
    learning: int
    weights: int
    optimizer: int
    average: int
    gradients: int
    whole: int
    activations: int
    total: int


def plan(manifest: FinetuneManifest, shape: Bucket, compute: torch.dtype) -> Need:
    """What a step with clips of one shape needs, in arithmetic of dtype `compute`. Of a hub, only configurations come.

    Raises:
        ManifestError: the clips of a batch, or the frames of a clip, cannot be shared among so many processes.
        ConditionError: the model takes no clips of that shape, or its heads cannot be shared.
        TrainingError: there is nothing of the names that are to learn.
        WeightsError: a part of the model is not there.
    """
    backbone = find_backbone(manifest.base.backbone)
    backbone.geometry.check(shape.width, shape.height, shape.num_frames)
    require_possible(manifest, backbone.geometry.latent_frames(shape.num_frames))
    transformer = _trainable(manifest, backbone, compute)
    sizes = [(weight.numel(), weight.nbytes, weight.requires_grad) for weight in transformer.parameters()]
    learning = sum(count for count, _, learns in sizes if learns)
    frozen = sum(size for _, size, learns in sizes if not learns)
    each = FLOAT32 * learning // manifest.parallel.processes
    weights = each + frozen // manifest.parallel.processes
    average = each if manifest.ema_decay else 0
    memory = PeakMemory()
    share, clips = clips_at_once(manifest)
    sharding = Sharding(transformer, manifest.parallel.processes, share > clips, memory)
    _step(backbone, transformer, shape, clips, memory)
    return Need(
        shape=shape,
        parameters=sum(count for count, _, _ in sizes),
        learning=learning,
        weights=weights,
        optimizer=2 * each,
        average=average,
        gradients=each,
        whole=sharding.whole,
        activations=memory.peak,
        total=weights + 2 * each + average + memory.total,
    )


def require_possible(manifest: FinetuneManifest, latent_frames: int) -> None:
    """Refuse numbers that do not come out even.

    Raises:
        ManifestError: the first of them, with what would.
    """
    for problem in uneven(manifest, latent_frames):
        raise ManifestError(problem)


def uneven(manifest: FinetuneManifest, latent_frames: int | None) -> Iterator[str]:
    """What does not come out even, and what would; of clips, if they are known, so many latent frames."""
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
    """The values of parallel.context with which so many processes can share clips of so many latent frames."""
    transformer = unbuilt(manifest)
    processes = manifest.parallel.processes
    divide = [size for size in range(1, min(processes, latent_frames) + 1) if processes % size == 0]
    return [size for size in divide if _can_share(transformer, size)]


def unbuilt(manifest: FinetuneManifest) -> Any:
    """The base's transformer on the meta device. Of a hub, only its configuration comes.

    Raises:
        WeightsError: it is not there.
    """
    model_class = find_backbone(manifest.base.backbone).classes["transformer"]
    return build(model_class, locate_config(manifest.base, "transformer"))


def clips_at_once(manifest: FinetuneManifest) -> tuple[int, int]:
    """A process's clips of a batch, and how many of them it takes at once."""
    share = manifest.batch_size * manifest.parallel.context // manifest.parallel.processes
    return share, min(share, manifest.micro_batch_size or share)


def _can_share(transformer: Any, size: int) -> bool:
    try:
        transformer.share_frames(Imagined(0, size, None))
    except ConditionError:
        return False
    return True


def _trainable(manifest: FinetuneManifest, backbone: Backbone, compute: torch.dtype) -> Any:
    """The transformer in training, as the process that has most of the frames sees it."""
    transformer = unbuilt(manifest)
    choose(transformer, manifest.train)
    if manifest.parallel.context > 1:
        transformer.share_frames(Imagined(0, manifest.parallel.context, None))
    if manifest.activation_checkpointing:
        transformer.enable_gradient_checkpointing(_recompute)
        transformer.checkpoint_every_nth_block = manifest.activation_checkpointing
    return nn.Module.to(transformer.train(), compute)  # diffusers' own warns of what means nothing here


def _recompute(block: nn.Module, *inputs: Any) -> Any:
    """Run a block with activation checkpointing. torch recomputes it outside the dry run's mode, so set that again."""
    return checkpoint(block, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), FusedAttention()))


def _step(backbone: Backbone, transformer: Any, shape: Bucket, clips: int, memory: PeakMemory) -> None:
    with FusedAttention(), memory:
        _loss(backbone, transformer, shape, clips).backward()


def _loss(backbone: Backbone, transformer: Any, shape: Bucket, clips: int) -> Tensor:
    latents = (clips, *backbone.geometry.latent_shape(shape.width, shape.height, shape.num_frames))
    noisy, target, sigma_BF = empty(*latents), empty(*latents), empty(clips, latents[2])
    text = backbone.longest_text(transformer, clips)
    return frame_errors(backbone.predict(transformer, noisy, sigma_BF, text), target).mean()


PARTS = {
    "weights": "what learns in float32, the rest as it is computed with",
    "optimizer": "AdamW's two moments",
    "average": "moving average of the weights",
    "gradients": "in float32; they come as activations go, so a total may be less than the sum",
}
MORE = (2, 4)  # times as many processes, or to a clip


def report(manifest: FinetuneManifest, shapes: Sequence[Bucket], compute: torch.dtype, memory: int) -> Iterator[str]:
    """Line by line: what clips of each shape need of a device with `memory` bytes, and what else could be set.

    Raises:
        PusaError: as `plan`.
    """
    fullest: Need | None = None
    for shape in shapes:
        need = plan(manifest, shape, compute)
        if fullest is None:
            yield from _head(manifest, need, compute)
        yield f"{_name(shape):<16}{need.activations / GIB:>12.3f}{_verdict(need, memory)}"
        fullest = max(fullest or need, need, key=lambda need: need.total)
    assert fullest is not None, "a table has rows"
    geometry = find_family(manifest.base.backbone).geometry
    latent_frames = geometry.latent_frames(min(shape.num_frames for shape in shapes))
    contexts = ", ".join(map(str, legal_contexts(manifest, latent_frames)))
    yield f"parallel.context may be {contexts} with {manifest.parallel.processes} processes"
    if fullest.total > memory:
        yield from _others(manifest, fullest.shape, compute, memory)
    yield "Counted, not measured: workspaces of kernels, and what an allocator keeps, come on top."


def alternatives(manifest: FinetuneManifest) -> Iterator[FinetuneManifest]:
    """Settings that need less; those from the third on come on top of the first two. Some may not be possible."""
    yield manifest.model_copy(update={"activation_checkpointing": 1})
    least = manifest.model_copy(update={"activation_checkpointing": 1, "micro_batch_size": 1})
    yield least
    processes, context = manifest.parallel.processes, manifest.parallel.context
    shares = [(processes, context * more) for more in MORE]
    shares += [(processes * more, context) for more in MORE]
    shares += [(processes * more, context * more) for more in MORE]
    for pair in shares:
        yield least.model_copy(update={"parallel": Parallel.model_construct(processes=pair[0], context=pair[1])})
    if not isinstance(manifest.train, Lora):
        yield least.model_copy(update={"train": Lora(method="lora")})


def _head(manifest: FinetuneManifest, need: Need, compute: torch.dtype) -> Iterator[str]:
    processes, context = manifest.parallel.processes, manifest.parallel.context
    share, clips = clips_at_once(manifest)
    every = manifest.activation_checkpointing
    checkpointing = f"activation_checkpointing {every}" if every else "no activation_checkpointing"
    yield (
        f"{manifest.base.weights}: {manifest.train.method}, {str(compute).removeprefix('torch.')}, {checkpointing}; "
        f"{processes} processes, {context} to a clip, {share} clips a step each, {clips} at once"
    )
    yield f"{need.parameters:,} parameters, {need.learning:,} learn; GiB of each process:"
    for part, what in PARTS.items():
        if size := getattr(need, part):
            yield f"  {part:<14}{size / GIB:>9.3f}  {what}"
    yield f"  {'whole':<14}{need.whole / GIB:>9.3f}  blocks at work, gathered from all processes"
    yield f"{'clips':<16}{'activations':>12}{'total':>9}"


def _others(manifest: FinetuneManifest, shape: Bucket, compute: torch.dtype, memory: int) -> Iterator[str]:
    yield f"What may be set instead, for {_name(shape)}:"
    others = {_changes(manifest, other): other for other in alternatives(manifest)}
    for words, other in others.items():
        if not words:
            continue
        try:
            need = plan(other, shape, compute)
        except (ManifestError, ConditionError):  # not possible, so no alternative
            continue
        yield f"{_verdict(need, memory)}  {words}"


def _changes(manifest: FinetuneManifest, other: FinetuneManifest) -> str:
    """What was set, as a manifest or the command line says it."""
    mine, theirs = manifest.parallel, other.parallel
    said = {
        "activation_checkpointing: 1": other.activation_checkpointing != manifest.activation_checkpointing,
        "micro_batch_size: 1": other.micro_batch_size != manifest.micro_batch_size and clips_at_once(other)[0] > 1,
        f"train: {other.train.method}": other.train != manifest.train,
        f"parallel.context: {theirs.context}": theirs.context != mine.context,
        f"{theirs.processes} processes": theirs.processes != mine.processes,
    }
    return ", ".join(words for words, changed in said.items() if changed)


def _verdict(need: Need, memory: int) -> str:
    fits = "fits" if need.total <= memory else "does NOT fit"
    return f"{need.total / GIB:>9.3f}  {fits} into {memory / GIB:.1f}"


def _name(shape: Bucket) -> str:
    return f"{shape.width}x{shape.height}x{shape.num_frames}"
