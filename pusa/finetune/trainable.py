"""Build the transformer to be trained: sharded over the processes while it has no weights, then filled one by one."""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from pusa.backbones.context import Context
from pusa.diffusion.seeds import derived
from pusa.errors import TrainingError
from pusa.finetune.parallel import World, part_of, shard
from pusa.manifest.models import FinetuneManifest
from pusa.manifest.training import Full, Lora, Partial
from pusa.weights.load import build, cast, is_finite, read_merged, stored_tensors
from pusa.weights.lora import effective_alpha, peft_settings
from pusa.weights.model import Model
from pusa.weights.source import PartFiles

BASE_LAYER = ".base_layer"  # PEFT inserts this into the names of the layers that a LoRA adds to


def configure(
    transformer: Any,
    manifest: FinetuneManifest,
    context: Context,
    checkpoint_block: Callable[..., Any] | None = None,
) -> None:
    """Set up a transformer for training: trainable parameters, shared frames, activation checkpointing.

    Args:
        transformer: a diffusers model that is a `TrainableTransformer`, on any device.
        manifest: the recipe.
        context: the processes that share the frames of a clip.
        checkpoint_block: runs a block with activation checkpointing; default: as diffusers does it.

    Raises:
        TrainingError: `manifest.train` names parameters that do not exist.
        ConditionError: the heads cannot be divided among the processes of the context.
    """
    set_trainable(transformer, manifest.train)
    if context.size > 1:
        transformer.share_frames(context)
    if manifest.activation_checkpointing:
        transformer.enable_gradient_checkpointing(checkpoint_block)
        transformer.checkpoint_every_nth_block = manifest.activation_checkpointing


def set_trainable(transformer: Any, method: Full | Partial | Lora) -> None:
    """Make the parameters that `method` names trainable and freeze the others.

    A LoRA's parameters are added on the device and in the dtype of their layers, without values: see `initial_lora`.

    Raises:
        TrainingError: as `trainable_names`.
    """
    names = set(trainable_names(transformer, method))
    if isinstance(method, Lora):
        config = LoraConfig(**peft_settings(names, method.rank, effective_alpha(method)))
        with torch.device(next(transformer.parameters()).device):
            transformer.add_adapter(config)
    for name, weight in transformer.named_parameters():
        weight.requires_grad_(is_lora(name) if isinstance(method, Lora) else name in names)


def trainable_names(transformer: nn.Module, method: Full | Partial | Lora) -> list[str]:
    """Return the names of the parameters to train; for a LoRA, of the layers that it is added to.

    Raises:
        TrainingError: a name of `method` matches none in this transformer; the error suggests similar names.
    """
    parameters = [name for name, _ in transformer.named_parameters()]
    if isinstance(method, Full):
        return parameters
    if isinstance(method, Partial):
        return _matching(parameters, method.names, fnmatchcase, "matches no weight", by_end=False)
    layers = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    return _matching(layers, method.targets, _ends_with, "matches the end of no linear layer's name", by_end=True)


def base_name(name: str) -> str:
    """Return the name that a parameter of the base has in a transformer without a LoRA."""
    return name.replace(f"{BASE_LAYER}.", ".")


def is_lora(name: str) -> bool:
    """Return whether a parameter belongs to a LoRA, by its name."""
    return ".lora_A." in name or ".lora_B." in name


def initial_lora(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """Return a LoRA parameter's initial values, fp32 on the CPU: A uniform in +-1 / sqrt(in), B zero, so B A is zero.

    They depend only on the name and the seed, so not on the number of processes. PEFT and LoRA's published code do the
    same.
    """
    values = torch.zeros(*shape)
    if ".lora_A." in name:
        generator = derived("lora", seed, name)
        nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
    return values


def _ends_with(name: str, target: str) -> bool:
    return fnmatchcase(f".{name}", f"*.{target}")


def _matching(
    names: Sequence[str], patterns: Iterable[str], matches: Callable[[str, str], bool], problem: str, by_end: bool
) -> list[str]:
    """Return the names that match any of the patterns, in their order."""
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            # Blocks differ in their number only, so suggest one name for all of them; for "to_qu", only ends of names.
            beginning = r"^.*\.(?=[a-z])" if by_end and "." not in pattern else r"^$"
            forms = [re.sub(r"(?<=\.)\d+(?=\.)", "*", re.sub(beginning, "", name)) for name in names]
            known = list(dict.fromkeys(forms))
            near = difflib.get_close_matches(pattern, known, n=5, cutoff=0.3) or known[:5]
            raise TrainingError(f"train: {pattern!r} {problem}; similar names are {', '.join(near)}")
    return [name for name in names if any(matches(name, pattern) for pattern in patterns)]


def build_trainable(model: Model, manifest: FinetuneManifest, world: World, compute: torch.dtype) -> Any:
    """Return the base's transformer to train, in training mode, sharded over the processes.

    Trainable parameters are fp32. Frozen ones have the dtype `compute`, but for those that the model keeps in fp32.

    Raises:
        WeightsError: the base is missing or its weights do not fit.
        TrainingError: `manifest.train` names parameters that do not exist.
        ConditionError: the heads cannot be divided among the processes of a context.
    """
    with model.reading(manifest.part) as source:
        return _build_from(source, model, manifest, world, compute)


def _build_from(source: PartFiles, model: Model, manifest: FinetuneManifest, world: World, compute: torch.dtype) -> Any:
    transformer = build(model.backbone, source)
    configure(transformer, manifest, world.context)
    cast(transformer, compute)
    for weight in transformer.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    if manifest.compile:
        for block in transformer.blocks:
            block.compile()
    shard(transformer, world, compute)
    transformer.to_empty(device=world.device)
    for buffer in transformer.buffers():  # the values that `to_empty` left there may look like real ones
        buffer.fill_(math.nan)
    model.backbone.finish(source.part, transformer)
    assert all(is_finite(buffer) for buffer in transformer.buffers()), "a buffer has no values"
    _load_weights(transformer, source, manifest.seed)
    return transformer.train()


@torch.no_grad()
def _load_weights(transformer: nn.Module, source: PartFiles, seed: int) -> None:
    """Read each weight whole, one at a time, and keep this process's shard of it."""
    source = source.in_fixed_order()
    weights = dict(transformer.named_parameters())
    stored = stored_tensors(source, {base_name(n): tuple(w.shape) for n, w in weights.items() if not is_lora(n)})
    additions = source.additions()  # of the base's LoRAs, which are merged
    for name, weight in weights.items():
        plain = base_name(name)
        if is_lora(name):
            full = initial_lora(name, tuple(weight.shape), seed)
        else:
            full = read_merged(plain, stored[plain], weight.dtype, additions.get(plain, ()), weight.device)
        weight.copy_(part_of(full, weight))
