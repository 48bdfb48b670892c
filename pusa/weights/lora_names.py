"""Name what a LoRA changes: from the spellings of the tools that wrote it to diffusers' names, and back. No torch here.

A tool writes a prefix or none, then the names of diffusers or those of the family's original layout, with dots, or as
kohya does with underscores in their place. A family's layout says which names it knows; so no spelling is guessed.
"""

import functools
import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pusa.backbones import all_families
from pusa.backbones.family import Family, LayoutFile, Rule
from pusa.errors import WeightsError
from pusa.system.text import join_names
from pusa.weights.stored import StoredModel, to_diffusers
from pusa.weights.tensors import StoredTensor

DIFFUSERS_PREFIX = "transformer."  # in diffusers' files, which may change several parts of a model
PEFT_PREFIX = "base_model.model."
ORIGINAL_PREFIX = "diffusion_model."  # ComfyUI's, before original names
PREFIXES = (PEFT_PREFIX, DIFFUSERS_PREFIX, "pipe.dit.", "model.", ORIGINAL_PREFIX)  # stripped in this order
FLAT_PREFIXES = ("lora_unet_", "lora_transformer_")  # kohya's, before names with underscores
MODULATION = ("modulation", "scale_shift_table")  # original and diffusers' name of the parameter that `.diff_m` changes
DELTAS = {
    "diff": "weight",
    "diff_b": "bias",
    "diff_m": "modulation",
}  # how a whole delta's name ends -> what it changes
_PAIR = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up"}
# PEFT writes the name of the adapter, "default", where the file is a plain dump of its modules.
_NAME = re.compile(rf"(.+)\.(?:({'|'.join(_PAIR)})(?:\.default)?\.weight|(alpha|{'|'.join(DELTAS)}))")
Modules = dict[str, dict[str, StoredTensor]]  # the module's name in the LoRA -> role -> tensor
FEW = 3  # weights that a message names; it counts the others
MAX_BLOCKS = 256  # more than any transformer may have; names of later blocks are unknown ones


@dataclass(frozen=True)
class Spelling:
    """The names of a family's transformer, as either diffusers or the original layout spells them."""

    family: Family | None = None  # None: no family knows the names, which are kept as they are
    original: bool = False
    rules: Mapping[str, Rule] = field(default_factory=dict)  # tensor name -> how diffusers names and splits it
    flat: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # kohya's form of a module's name -> the names
    originals: Mapping[str, Rule] = field(default_factory=dict)  # diffusers' name -> the rule of the original tensor

    def rule_of(self, module: str, kind: str) -> Rule | None:
        """Return the rule of a module's tensor, or None if the name is unknown.

        Args:
            module: the name in a LoRA without its prefix, or with kohya's.
            kind: "weight", "bias" or "modulation". A parameter that is not a module's may be named itself.

        Raises:
            WeightsError: kohya's form stands for several modules.
        """
        endings = MODULATION if kind == "modulation" else (kind,)
        names = {name: self.rules.keys() & _tensors(name, endings) for name in self._modules(module)}
        known = {self.rules[tensor]: name for name, tensors in names.items() for tensor in tensors}
        if len(known) > 1:
            shown = join_names(list(known.values()))
            raise WeightsError(f"{module} stands for {shown}; expected names with dots, which are distinct")
        return next(iter(known), None)

    def knows(self, module: str) -> bool:
        """Return whether a name of a module, or of a parameter, is one of the family's."""
        return any(self.rule_of(module, kind) for kind in ("weight", "bias", "modulation"))

    def in_diffusers_names(
        self, module: str, kind: str, stored: StoredTensor, inputs: int | None
    ) -> list[tuple[str, StoredTensor]]:
        """Return the weights that a tensor is added to, by diffusers' names, with its part for each.

        Of a name that no family has, the tensor is returned under that name.

        Raises:
            WeightsError: it has no part for each; `inputs` are the layer's, if they are known.
        """
        rule = self.rule_of(module, kind)
        return [(f"{module}.{kind}", stored)] if rule is None else to_diffusers(rule, stored, inputs)

    def _modules(self, module: str) -> Iterable[str]:
        flat = next((module.removeprefix(prefix) for prefix in FLAT_PREFIXES if module.startswith(prefix)), None)
        return (module,) if flat is None else self.flat.get(flat.lstrip("_"), ())


def _tensors(module: str, endings: Iterable[str]) -> set[str]:
    """Return the names that a module's tensor may have; a modulation may be named itself."""
    itself = {module} if module.rpartition(".")[2] in MODULATION else set()
    return itself | {f"{module}.{ending}" for ending in endings}


def strip_prefix(name: str) -> str:
    """Return a tensor's name in a LoRA without the prefix that a tool wrote before every name."""
    return functools.reduce(str.removeprefix, PREFIXES, name)


def find_spelling(modules: Collection[str]) -> Spelling:
    """Return the spelling that knows the most of these names of modules, which are without prefix or with kohya's."""
    numbers = [int(n) for module in modules for n in re.findall(r"blocks[._](\d{1,4})(?=[._]|$)", module)]
    blocks = max((number for number in numbers if number < MAX_BLOCKS), default=0) + 1
    return max((Spelling(), *_spellings(blocks)), key=lambda spelling: sum(map(spelling.knows, modules)))


@functools.lru_cache(8)
def _spellings(blocks: int) -> tuple[Spelling, ...]:
    """Return both spellings of every layout for a transformer with at least this number of blocks."""
    known: dict[str, tuple[Family, LayoutFile]] = {}
    for family in all_families():
        for file in (file for part in family.transformers for file in family.layout.files_of(part)):
            known.setdefault(family.layout.name, (family, file))
    found = []
    for family, file in known.values():
        # A layout may name the last block otherwise. Where it is not known which is the last, a later one is assumed.
        named = [{name.format(n) for name in file.blocks for n in range(count)} for count in (blocks, blocks + 1)]
        rules = {rule.original: rule for names in named for rule in file.rules(names)}
        rules |= {file.spell(name): rule for name, rule in rules.items() if file.spelling}
        originals = {name: rule for names in named for rule in file.rules(names) for name in rule.diffusers}
        own = {name: Rule(name, (name,)) for name in originals}
        found += [
            Spelling(family, False, own, _flat(own), originals),
            Spelling(family, True, rules, _flat(rules), originals),
        ]
    return tuple(found)


def describe_names(names: Iterable[str]) -> tuple[str, str]:
    """Return the family whose names a LoRA's tensors have, "unknown" if none has, and in which form they are."""
    stripped = {name: strip_prefix(name) for name in names}
    modules = {match[1] for name in stripped.values() if (match := _NAME.fullmatch(name))}
    spelling = find_spelling(modules)
    if spelling.family is None:
        return "unknown", "of no known family"
    flat = [prefix for prefix in FLAT_PREFIXES if any(module.startswith(prefix) for module in modules)]
    prefixes = {name.removesuffix(rest) for name, rest in stripped.items()} - {""}
    form = f"of {spelling.family.layout.name if spelling.original else 'diffusers'}" + ", as kohya's" * bool(flat)
    form += f", behind {' and '.join(sorted(prefixes) or flat)}" * bool(prefixes or flat)
    return next(iter(spelling.family.marks), spelling.family.name), form


def original_rules(path: Path, names: Collection[str]) -> list[Rule]:
    """Return the rules of the original tensors that have these weights of diffusers' names, each once.

    Args:
        path: the LoRA's file, for messages.
        names: of the weights that it adds to.

    Raises:
        WeightsError: no family has a name.
    """
    originals = find_spelling([name.removesuffix(".weight").removesuffix(".bias") for name in names]).originals
    if unknown := [name for name in names if name not in originals]:
        raise WeightsError(f"{path} changes {join_names(unknown, FEW)}, which no known original layout has a name for")
    return list(dict.fromkeys(originals[name] for name in names))


def _flat(tensors: Iterable[str]) -> dict[str, tuple[str, ...]]:
    modules: dict[str, dict[str, None]] = defaultdict(dict)
    for tensor in tensors:
        module, _, ending = tensor.rpartition(".")
        name = module if ending in ("weight", "bias") else tensor
        for known in {name, module}:
            modules[known.replace(".", "_")][known] = None
    return {flat: tuple(names) for flat, names in modules.items()}


def read_modules(model: StoredModel) -> Modules:
    """Return a LoRA's tensors by the module's name and their roles: "down", "up", "alpha", or a key of `DELTAS`.

    Raises:
        WeightsError: a tensor is unknown, there twice, lacks its counterpart or does not fit it.
    """
    modules: Modules = defaultdict(dict)
    wrong: dict[str, list[str]] = defaultdict(list)
    for name, stored in model.tensors.items():
        match = _NAME.fullmatch(strip_prefix(name))
        role = (_PAIR.get(match[2]) or match[3]) if match else None
        if not match or not role:
            wrong["unknown"].append(name)
        elif role in modules[match[1]]:
            wrong["the same twice, under different names"].append(name)
        else:
            modules[match[1]][role] = stored
    for name, tensors in modules.items():
        pair = [tensors[role].shape for role in ("down", "up") if role in tensors]
        if not pair and "alpha" in tensors:
            wrong["an alpha without its lora_A and lora_B"].append(name)
        elif len(pair) == 1:
            wrong["a lora_A or lora_B without the other"].append(name)
        elif pair and not _fit(*pair):
            wrong["a lora_A and a lora_B that do not fit each other"].append(name)
        if "alpha" in tensors and math.prod(tensors["alpha"].shape) != 1:
            wrong["an alpha that is not one number"].append(name)
    if wrong or not modules:
        problems = "; ".join(f"{kind}: {join_names(names)}" for kind, names in wrong.items())
        raise WeightsError(f"{model.path} is not a complete LoRA of a known layout; {problems or 'it has no tensors'}")
    return dict(modules)


def _fit(down: tuple[int, ...], up: tuple[int, ...]) -> bool:
    """Return whether B A can be computed: of a convolution, the kernel must be A's alone."""
    return len(down) >= 2 <= len(up) and 0 < down[0] == up[1] and set(up[2:]) <= {1} and len(up) in (2, len(down))
