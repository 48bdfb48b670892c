"""Judge the settings that PEFT keeps of a LoRA: what changes more than alpha / rank * B A is refused by name.

Every field of PEFT's LoraConfig is in one of the tables; `tests/weights/test_lora_settings.py` checks it.
"""

from collections.abc import Mapping
from typing import Any

from pusa.system.text import join_names, preview, printable

_MERGE = "merge it with PEFT's merge_and_unload into the model that it was trained on, and name that as `checkpoint:`"
_NEVER = "it cannot be merged into a model's weights; train without it"
_CONVERT = (
    "PEFT took the initial B A away from the base's weights; save the LoRA with PEFT's "
    "save_pretrained(FOLDER, path_initial_model_for_weight_conversion=INITIAL)"
)

HARMLESS = {
    # Which layers, and of which rank: the tensors say so themselves. `find_misfits` compares the two.
    "r", "rank_pattern", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "ensure_weight_tying",  # of embeddings, which the transformers here do not have
    # How it was trained.
    "task_type", "inference_mode", "runtime_config", "lora_dropout",
    # Where it comes from.
    "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    # Used only together with a setting that is refused.
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "megatron_core",
}  # fmt: skip
INITIAL = {
    # The values of init_lora_weights that change the base's weights, by how they begin, and what to do.
    **dict.fromkeys(("pissa", "olora", "corda", "lora_ga"), _CONVERT),
    "loftq": f"LoftQ quantized the base's weights; {_MERGE}",
}
KEPT_BASE = ("true", "false", "none", "gaussian", "orthogonal", "eva", "mica")  # other values of init_lora_weights
REFUSED = {
    "use_rslora": "its scale is alpha / sqrt(rank); if all ranks are r, set it to false and multiply lora_alpha by "
    "sqrt(r)",
    **dict.fromkeys(
        (
            "use_dora", "use_bdlora", "kasa_config", "velora_config", "monteclora_config", "alpha_pattern", "bias",
            "lora_bias", "fan_in_fan_out", "modules_to_save", "trainable_token_indices", "target_parameters",
        ),
        _MERGE,
    ),
    **dict.fromkeys(
        ("use_qalora", "arrow_config", "alora_invocation_tokens", "layer_replication", "megatron_config"), _NEVER
    ),
}  # fmt: skip


def find_refused(settings: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each setting that is refused: its name, its value, and what to do.

    Args:
        settings: as in PEFT's adapter_config.json. A setting that is off (null, false, empty) is never refused.
    """
    return [
        f"{printable(name)} {preview(value)}: {mend}"
        for name, value in settings.items()
        if (mend := _mend(name, value)) is not None
    ]


def _mend(name: str, value: Any) -> str | None:
    """Return what to do about a setting that changes the formula, or None if it does not change it."""
    if name in HARMLESS or name == "lora_alpha":
        return None
    if name == "init_lora_weights":
        text = str(value).lower()
        mends = [mend for start, mend in INITIAL.items() if text.startswith(start)]
        known = mends[0] if mends else f"not known; expected one of {', '.join((*KEPT_BASE, *INITIAL))}"
        return None if text in KEPT_BASE else known
    if not value or (name, value) in (("bias", "none"), ("peft_type", "LORA")):
        return None
    if name == "peft_type":
        return "expected 'LORA'"
    return REFUSED.get(name, "an unknown setting; if it does not change what is added to the weights, remove it")


def find_misfits(settings: Mapping[str, Any], ranks: Mapping[str, int], own: bool) -> list[str]:
    """Return a sentence for each way in which settings do not fit a LoRA's tensors.

    Args:
        settings: as in PEFT's adapter_config.json.
        ranks: the rank of each layer, by the layer's name.
        own: the settings lie in the file of the tensors, whose layers a tool may have renamed. Else they may be another
            LoRA's, so the names of the layers must fit, too.
    """
    problems = []
    rank, pattern, targets = (settings.get(name) for name in ("r", "rank_pattern", "target_modules"))
    known = [rank, *(pattern.values() if isinstance(pattern, dict) else ())]
    if rank is not None and (others := sorted(set(ranks.values()) - {r for r in known if type(r) is int})):
        rest = f" and rank_pattern {preview(pattern)}" if pattern else ""
        problems.append(f"r is {preview(rank)}{rest}, but the tensors have rank {', '.join(map(str, others))}")
    if isinstance(targets, list) and not own:  # PEFT matches whole names or their ends; a text is a pattern
        ends = tuple(f".{target}" for target in targets)
        if strange := [name for name in ranks if not f".{name}".endswith(ends)]:
            problems.append(f"target_modules {preview(targets)} do not name {join_names(strange)}")
    return problems
