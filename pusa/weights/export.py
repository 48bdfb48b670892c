"""Write a fine-tune for use elsewhere: `pusa weights export CHECKPOINT FOLDER --to diffusers|genmo|lora|peft`.

Every file says in its metadata what it was made from and how.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from pusa.backbones import BACKBONES
from pusa.errors import WeightsError
from pusa.files import scratch, sole_writer
from pusa.manifest import ModelSpec
from pusa.tables import find
from pusa.weights.addition import find_adapter
from pusa.weights.convert import write_models
from pusa.weights.found import Found, find_models, read_model
from pusa.weights.load import DTYPES
from pusa.weights.lora import copy_lora, to_peft
from pusa.weights.resolve import locate
from pusa.weights.source import Source
from pusa.weights.write import config_of, write_transformer

ALONE = {"lora": copy_lora, "peft": to_peft}


def export(checkpoint: Path, folder: Path, to: str, base: str | None = None) -> list[Path]:
    """Write the result of a fine-tune into `folder`.

    Args:
        checkpoint: a checkpoint of `pusa finetune`, its `last` too, a transformer's folder or file, or a LoRA.
        folder: a transformer becomes `transformer/` in it, or `dit.safetensors`; a LoRA its files.
        to: "diffusers" or "genmo", a transformer; "lora" or "peft", a LoRA alone as diffusers or PEFT keep it.
        base: weights to merge a LoRA into: a folder, "builtin:NAME" or "hf:ORG/NAME[@revision]".

    Returns:
        The files that the result consists of.

    Raises:
        WeightsError: that cannot be made of this checkpoint, or it does not fit the base.
        StageError: another process is writing there.
    """
    checkpoint = checkpoint.resolve()  # `last` may move on
    adapter = find_adapter(checkpoint)
    _require_possible(checkpoint, adapter, to, base)
    with sole_writer(folder):
        if adapter is None:
            return write_models([_transformer(checkpoint)], folder, to)
        if base is None:
            return ALONE[to](adapter, folder, read_model(adapter).record())
        with _merged(adapter, base, folder) as model:
            return write_models([model], folder, to)


def _require_possible(checkpoint: Path, adapter: Path | None, to: str, base: str | None) -> None:
    if adapter is None and (to in ALONE or base):
        asked = f"--to {to}" if to in ALONE else "--base"
        raise WeightsError(
            f"{checkpoint} holds no LoRA, and {asked} is for LoRAs; allowed are --to diffusers and genmo"
        )
    if adapter and (to in ALONE) == (base is not None):
        raise WeightsError(
            f"{adapter} is a LoRA: --to lora and --to peft write it alone, --to diffusers and --to genmo merge it "
            f"into the weights that --base names; asked for is --to {to} {f'with --base {base}' if base else 'alone'}"
        )


def _transformer(checkpoint: Path) -> Found:
    found = [model for model in find_models(checkpoint) if model.part == "transformer"]
    if len(found) != 1:
        raise WeightsError(f"{checkpoint} holds {len(found)} transformers; wanted is one")
    return found[0]


@contextmanager
def _merged(adapter: Path, base: str, folder: Path) -> Iterator[Found]:
    """The transformer that a LoRA makes of its base, in the base's dtype, on disk for as long as it is needed."""
    record = read_model(adapter).record()
    spec = ModelSpec(weights=base, backbone=record.get("backbone") or ModelSpec.model_fields["backbone"].default)
    source = replace(locate(spec, "transformer"), adapter=adapter)
    transformer = find(BACKBONES, spec.backbone, "backbone")().load("transformer", source, _dtype(source))
    with scratch(folder / "merged") as partial:
        write_transformer(partial, transformer.state_dict(), config_of(transformer), record)
        yield read_model(partial)


def _dtype(source: Source) -> torch.dtype:
    """That of the weights, and fp32 where they have several."""
    there = {stored.dtype for path in source.paths for stored in read_model(path).tensors.values()}
    return DTYPES.get(there.pop(), torch.float32) if len(there) == 1 else torch.float32
