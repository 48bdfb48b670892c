"""`pusa weights ...`: say what a file is, convert it, download it ahead of a run."""

import argparse
import json
import logging
import sys
from pathlib import Path

from flows.options import add_command, positive


def add_commands(parser: argparse.ArgumentParser) -> None:
    """inspect, convert, export and fetch."""
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    inspect = add_command(commands, "inspect", "say what weights are: family, layout, latent space", run_inspect)
    inspect.add_argument("weights", help="a file, a folder, builtin:NAME or hf:ORG/NAME[@revision][:file]")
    inspect.add_argument("--json", action="store_true", help="the same as a JSON list")

    convert = add_command(commands, "convert", "between genmo's single files and diffusers' folders", run_convert)
    convert.add_argument("weights", help="a file, a folder, builtin:NAME or hf:ORG/NAME[@revision][:file]")
    convert.add_argument("folder", type=Path, help="where to")
    convert.add_argument("--to", choices=("diffusers", "genmo"), required=True, help="the layout wanted")
    convert.add_argument("--latent-space", choices=("dit", "vae"), help="recorded where the weights do not say it")
    convert.add_argument("--shard-gb", type=positive, default=5.0, help="the size of diffusers' shards")

    export = add_command(commands, "export", "write a fine-tune for use elsewhere, with its lineage", run_export)
    export.add_argument("checkpoint", help="RUN/checkpoints/last, a transformer's folder or file, or a LoRA")
    export.add_argument("folder", type=Path, help="where to")
    export.add_argument(
        "--to",
        choices=("diffusers", "genmo", "lora", "peft"),
        required=True,
        help="a transformer in diffusers' or genmo's layout, or a LoRA alone in diffusers' or PEFT's",
    )
    export.add_argument(
        "--base", help="to merge a LoRA into, in the dtype of these: what a manifest's weights or checkpoint names"
    )

    fetch = add_command(commands, "fetch", "download from a hub what a run would, ahead of it", run_fetch)
    fetch.add_argument("weights", help="hf:ORG/NAME[@revision][:file]")
    fetch.add_argument("--parts", nargs="+", help="of a model: transformer, vae, text_encoder, tokenizer; default all")


def run_inspect(options: argparse.Namespace) -> int:
    """`pusa weights inspect WEIGHTS`."""
    from pusa.weights.inspect import describe, table

    facts = describe(_path(options.weights))
    print(json.dumps(facts, indent=2) if options.json else table(facts))
    return 0


def run_convert(options: argparse.Namespace) -> int:
    """`pusa weights convert WEIGHTS FOLDER --to LAYOUT`."""
    from pusa.weights.convert import convert

    shard_bytes = int(options.shard_gb * 1e9)
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING)
    for path in convert(_path(options.weights), options.folder, options.to, options.latent_space, shard_bytes):
        print(path)
    return 0


def run_export(options: argparse.Namespace) -> int:
    """`pusa weights export CHECKPOINT FOLDER --to LAYOUT`."""
    from pusa.weights.export import export

    for path in export(_path(options.checkpoint), options.folder, options.to, options.base):
        print(path)
    return 0


def run_fetch(options: argparse.Namespace) -> int:
    """`pusa weights fetch NAME`."""
    from pusa.backbones import all_parts
    from pusa.weights.hub import HubName, fetch_file, fetch_parts

    name = HubName.parse(options.weights)
    print(fetch_file(name) if name.file else fetch_parts(name, options.parts or all_parts()))
    return 0


def _path(weights: str) -> Path:
    """Where it lies, downloaded if need be."""
    from pusa.weights.hub import PREFIX, HubName, fetch_file, fetch_model
    from pusa.weights.resolve import builtin

    if weights.startswith(PREFIX):
        name = HubName.parse(weights)
        return fetch_file(name) if name.file else fetch_model(name)
    return builtin(weights) if weights.startswith("builtin:") else Path(weights)
