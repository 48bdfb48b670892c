"""The transformer to be trained: shared out over the processes before it has any weights, then filled one by one."""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from peft import LoraConfig
from torch import Generator, Tensor, nn

from pusa.errors import TrainingError
from pusa.finetune.parallel import World, part_of, shard
from pusa.manifest.models import FinetuneManifest
from pusa.manifest.training import Full, Lora, Partial
from pusa.system.files import derived_seed
from pusa.weights.load import build, merge_lora_layer, read_tensor, stored_tensors
from pusa.weights.lora import alpha_of, settings_of
from pusa.weights.model import Model
from pusa.weights.source import Source

BASE_LAYER = ".base_layer"  # what PEFT puts into the names of a layer that it adds to


def choose(transformer: Any, method: Full | Partial | Lora) -> None:
    """Make of a transformer's parameters those learn that `method` means, and no others.

    A LoRA's are added, on the device and in the dtype of their layers; `initial` says what they start from.

    Raises:
        TrainingError: as `chosen`.
    """
    names = set(chosen(transformer, method))
    if isinstance(method, Lora):
        config = LoraConfig(**settings_of(names, method.rank, alpha_of(method)))
        with torch.device(next(transformer.parameters()).device):
            transformer.add_adapter(config)
    for name, weight in transformer.named_parameters():
        weight.requires_grad_(is_added(name) if isinstance(method, Lora) else name in names)


def chosen(transformer: nn.Module, method: Full | Partial | Lora) -> list[str]:
    """The names of the parameters that will learn; for a LoRA, of the layers that it adds to.

    Raises:
        TrainingError: a name means nothing in this transformer; near ones are named.
    """
    parameters = [name for name, _ in transformer.named_parameters()]
    if isinstance(method, Full):
        return parameters
    if isinstance(method, Partial):
        return _matching(parameters, method.names, fnmatchcase, "the name of no weight")
    layers = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    return _matching(layers, method.targets, _ends_with, "the end of no linear layer's name")


def base_name(name: str) -> str:
    """A parameter's name in the plain transformer, of one that is not added."""
    return name.replace(f"{BASE_LAYER}.", ".")


def is_added(name: str) -> bool:
    """Whether a parameter is a LoRA's, by its name."""
    return ".lora_A." in name or ".lora_B." in name


def initial(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """What an added parameter starts from, fp32 on the CPU: A uniform in +-1 / sqrt(in), B zero, so nothing is added.

    It depends on its name and the seed alone, and so not on how many processes there are. As PEFT, which has it of
    LoRA's published code.
    """
    start = torch.zeros(*shape)
    if ".lora_A." in name:
        generator = Generator().manual_seed(derived_seed("lora", seed, name))
        nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
    return start


def _ends_with(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def _matching(
    names: Sequence[str], patterns: Iterable[str], matches: Callable[[str, str], bool], what: str
) -> list[str]:
    """The names that any of the patterns means, in their order."""
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            near = _near(pattern, names, by_end=matches is _ends_with and "." not in pattern)
            raise TrainingError(f"train: {pattern!r} is {what}; near are {', '.join(near)}")
    return [name for name in names if any(matches(name, pattern) for pattern in patterns)]


def _near(pattern: str, names: Sequence[str], by_end: bool) -> list[str]:
    """Names like it, those of all blocks as one; or only their ends."""
    beginning = r"^.*\.(?=[a-z])" if by_end else r"^$"
    forms = [re.sub(r"(?<=\.)\d+(?=\.)", "*", re.sub(beginning, "", name)) for name in names]
    known = list(dict.fromkeys(forms))
    return difflib.get_close_matches(pattern, known, n=5, cutoff=0.3) or known[:5]


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
    if manifest.activation_checkpointing:
        transformer.enable_gradient_checkpointing()
        transformer.checkpoint_every_nth_block = manifest.activation_checkpointing
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
            full = merge_lora_layer(plain, full, layers[plain])
        weight.copy_(part_of(full, weight))
