"""What the plan of a fine-tune says to people: what each process needs, and where that is too much, what would fit."""

from collections.abc import Iterator, Sequence

import torch

from pusa.backbones.geometry import GEOMETRIES
from pusa.errors import ConditionError, ManifestError
from pusa.manifest import Bucket, FinetuneManifest
from pusa.planning.finetune import Need, clips_at_once, legal_contexts, plan
from pusa.planning.memory import GIB
from pusa.training.settings import Lora, Parallel

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
    latent_frames = GEOMETRIES[manifest.base.backbone].latent_frames(min(shape.num_frames for shape in shapes))
    contexts = ", ".join(map(str, legal_contexts(manifest, latent_frames)))
    yield f"parallel.context may be {contexts} with {manifest.parallel.processes} processes"
    if fullest.total > memory:
        yield from _others(manifest, fullest.shape, compute, memory)
    yield "Counted, not measured: workspaces of kernels, and what an allocator keeps, come on top."


def alternatives(manifest: FinetuneManifest) -> Iterator[FinetuneManifest]:
    """Settings that need less; those from the third on come on top of the first two. Some may not be possible."""
    yield manifest.model_copy(update={"recompute": 1})
    least = manifest.model_copy(update={"recompute": 1, "micro_batch_size": 1})
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
    again = f"recompute {manifest.recompute}" if manifest.recompute else "no recompute"
    yield (
        f"{manifest.base.weights}: {manifest.train.method}, {str(compute).removeprefix('torch.')}, {again}; "
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
        "recompute: 1": other.recompute != manifest.recompute,
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
