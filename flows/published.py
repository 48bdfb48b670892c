"""`pusa import-latents` and `pusa export-latents`: the layout of the published data set, into a table and back."""

import argparse
from pathlib import Path
from typing import Any

from flows.options import add_command, count, log_to_console, positive, show


def add_commands(commands: Any) -> None:
    """import-latents and export-latents."""
    what = "torch files in the layout of the published data set -> a latents table"
    importing = add_command(commands, "import-latents", what, run_import)
    importing.add_argument("folder", type=Path, help="with videos/**/X.latent.pt, and captions/**/X.embed.pt or beside")
    importing.add_argument("--to", type=Path, required=True, metavar="TABLE", help="the latents table to make")
    importing.add_argument(
        "--weights", required=True, help="the model whose VAE and text encoder made them, which the files do not tell"
    )
    importing.add_argument("--text-encoder", help="a model to take T5 from, where the weights have none")
    importing.add_argument("--fps", type=positive, default=24.0, help="which the files do not tell; default 24")
    importing.add_argument("--shard-rows", type=count, default=32, help="rows a file; default 32")
    importing.add_argument("--compression", choices=("zstd", "none"), default="zstd", help="default zstd")
    importing.add_argument("--verify", action="store_true", help="hash all shards that are there, against bit rot")

    what = "a latents table -> torch files in the layout of the published data set"
    exporting = add_command(commands, "export-latents", what, run_export)
    exporting.add_argument("table", type=Path, help="a latents table, such as RUN/latents")
    exporting.add_argument("folder", type=Path, help="a new one, or one where the same export was begun")
    exporting.add_argument("--captions", action="store_true", help="also captions/X.txt")


def run_import(options: argparse.Namespace) -> int:
    """`pusa import-latents FOLDER --to TABLE --weights NAME`."""
    from pusa.exchange.importing import Settings, import_latents
    from pusa.manifest.models import ModelSpec

    model = ModelSpec(weights=options.weights, text_encoder=options.text_encoder).resolve_paths(options.to)
    settings = Settings(model, options.fps, options.shard_rows, options.compression, options.verify)
    log_to_console()
    show(import_latents(options.folder, options.to, settings))
    return 0


def run_export(options: argparse.Namespace) -> int:
    """`pusa export-latents TABLE FOLDER`."""
    from pusa.exchange.exporting import export_latents

    log_to_console()
    show(export_latents(options.table, options.folder, options.captions))
    return 0
