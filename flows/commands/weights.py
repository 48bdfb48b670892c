"""Inspect, convert, export and download weights: `pusa weights ...`."""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from flows.commands.options import File, Positive, Text, as_written
from flows.console import log_to_console, show
from pusa.backbones import all_families
from pusa.errors import WeightsError

if TYPE_CHECKING:
    LayoutName = str
    ExportName = str
else:
    LAYOUTS = ("diffusers", *(family.layout.name for family in all_families()))
    LayoutName = Literal[(*LAYOUTS, "safetensors")]
    ExportName = Literal[("pipeline", *LAYOUTS, "lora", "peft", "original-lora")]
HELP = "Inspect, convert, export and download weights."
Weights = Annotated[
    str,
    Parameter(converter=as_written, help="A file, a folder, builtin:NAME or hf:ORG/NAME[@revision][:file]."),
]


def inspect(weights: Weights, /, *, json_: Annotated[bool, Parameter(name="--json")] = False) -> int:
    """Report the family, the layout and the latent space of weights.

    Args:
        json_: Print the same as a JSON list.
    """
    from pusa.weights.inspect import describe, format_facts

    facts = describe(_path_of(weights))
    show(json.dumps(facts, indent=2) if json_ else format_facts(facts))
    return 0


def convert(
    weights: Weights,
    folder: File,
    /,
    *,
    to: LayoutName,
    latent_space: Literal["dit", "vae"] | None = None,
    shard_gb: Annotated[Positive, Parameter(metavar="GB")] = 5.0,
) -> int:
    """Convert between the original layout of a family (such as single files) and the folders of diffusers.

    Args:
        folder: The folder for the converted files.
        to: The layout of the converted files; safetensors: of a file of torch.save, whose code is not run.
        latent_space: The latent space to record, where the weights do not record one.
        shard_gb: The size of a shard of diffusers.
    """
    from pusa.weights.convert import convert

    log_to_console(logging.WARNING)
    if to == "safetensors":
        from pusa.weights.write import convert_pickle

        if latent_space:
            raise WeightsError(f"--latent-space {latent_space} was given, which --to safetensors does not record")
        show(convert_pickle(Path(weights), folder))
        return 0
    for path in convert(_path_of(weights), folder, to, latent_space, int(shard_gb * 1e9)):
        show(path)
    return 0


def export(
    checkpoint: Text,
    folder: File,
    /,
    *,
    to: ExportName,
    base: Annotated[str | None, Parameter(converter=as_written, metavar="NAME")] = None,
    strength: float | None = None,
    license_: Annotated[Text | None, Parameter(name="--license", metavar="TEXT")] = None,
) -> int:
    """Write a fine-tune for use elsewhere, with its lineage and a model card.

    Args:
        checkpoint: RUN/checkpoints/last, the folder or file of a transformer, or a LoRA.
        folder: The folder for the exported files.
        to: A whole pipeline with all parts of the base; a transformer in the layout of diffusers or of its authors; or
            a LoRA alone in the layout of diffusers (lora) or PEFT (peft), or with its authors' names, as ComfyUI reads
            them (original-lora).
        base: The weights to merge a LoRA into, in their dtype: a name that a manifest's weights or checkpoint can have.
            Of a pipeline, the model with the other parts; default: the recorded one.
        strength: What a LoRA that is merged is multiplied by; default 1.
        license_: The licence, for the card: an identifier such as apache-2.0, or a sentence.
    """
    log_to_console(logging.WARNING)
    if to == "pipeline":
        from pusa.weights.whole import export_pipeline

        paths = export_pipeline(_path_of(checkpoint), folder, base, 1.0 if strength is None else strength, license_)
    else:
        from pusa.weights.export import export

        paths = export(_path_of(checkpoint), folder, to, base, strength, license_)
    for path in paths:
        show(path)
    return 0


def fetch(
    weights: Annotated[Text, Parameter(help="hf:ORG/NAME[@revision][:file]")],
    /,
    *,
    parts: Annotated[list[str] | None, Parameter(consume_multiple=(1, None), json_list=False)] = None,
) -> int:
    """Download from a hub, ahead of a run, the files that the run needs.

    Args:
        parts: Parts of a model: transformer, vae, text_encoder, tokenizer; default all.
    """
    from pusa.weights.hub import HubName, fetch_file, fetch_model, fetch_parts

    name = HubName.parse(weights)
    show(fetch_file(name) if name.file else fetch_parts(name, parts) if parts else fetch_model(name))
    return 0


def _path_of(weights: str) -> Path:
    """Return the path of weights, after a download where they are on a hub."""
    from pusa.weights.hub import HUB_PREFIX, HubName, fetch_file, fetch_model
    from pusa.weights.resolve import builtin_folder

    if weights.startswith(HUB_PREFIX):
        name = HubName.parse(weights)
        return fetch_file(name) if name.file else fetch_model(name)
    return builtin_folder(weights) if weights.startswith("builtin:") else Path(weights)
