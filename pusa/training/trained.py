"""Which of a transformer's parameters learn: all, those that are named, or low-rank additions by PEFT.

All of it works on the meta device, so a method is checked before any weights are loaded.
"""

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
from pusa.files import derived_seed
from pusa.training.settings import Full, Lora, Partial
from pusa.weights.lora import alpha_of, settings_of

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
