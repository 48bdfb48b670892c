"""The transformer to be trained: shared out over the processes before it has any weights, then filled one by one."""

from typing import Any

import torch
from torch import nn

from pusa.manifest import FinetuneManifest
from pusa.model import Model
from pusa.training.parallel import World, part_of, shard
from pusa.training.trained import base_name, choose, initial, is_added
from pusa.weights.load import build, read_tensor, stored_tensors
from pusa.weights.lora import added
from pusa.weights.source import Source


def build_trainable(model: Model, manifest: FinetuneManifest, world: World, compute: torch.dtype) -> Any:
    """A denoiser in training mode, its weights those of the base.

    What learns is fp32; what does not is kept as it is computed with.

    Raises:
        WeightsError: the base is not there or does not fit.
        TrainingError: there is nothing of the names that are to learn.
        ConditionError: its heads cannot be shared among the processes of a context.
    """
    source = model.source("transformer")
    transformer = build(model.backbone.classes["transformer"], source)
    choose(transformer, manifest.train)
    for weight in transformer.parameters():
        weight.data = weight.data.to(torch.float32 if weight.requires_grad else compute)
    if world.context.size > 1:
        transformer.share_frames(world.context)
    if manifest.recompute:
        transformer.enable_gradient_checkpointing()
        transformer.recompute_every = manifest.recompute
    if manifest.compile:
        for block in transformer.blocks:
            block.compile()
    shard(transformer, world, compute)
    transformer.to_empty(device=world.device)
    assert not list(transformer.buffers()), "to_empty has left them without numbers"
    _fill(transformer, source, manifest.seed)
    return transformer.train()


@torch.no_grad()
def _fill(transformer: nn.Module, source: Source, seed: int) -> None:
    """One weight after the other is read whole, and of it the part kept that is this process's."""
    weights = dict(transformer.named_parameters())
    stored = stored_tensors(source, {base_name(n): tuple(w.shape) for n, w in weights.items() if not is_added(n)})
    layers = source.additions()
    for name, weight in weights.items():
        plain = base_name(name)
        if is_added(name):
            full = initial(name, tuple(weight.shape), seed)
        else:
            full = read_tensor(plain, stored[plain], weight.dtype)
        if plain in layers:  # the base is itself one with a LoRA
            full = added(plain, full, layers[plain])
        weight.copy_(part_of(full, weight))
