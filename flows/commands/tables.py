"""Look at tables, and exchange latents tables with the layouts of the published data sets."""

import json
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Group, Parameter
from cyclopts.validators import MutuallyExclusive

from flows.commands.options import Count, File, Text, as_written, to_positive
from flows.console import log_to_console, print_result, show
from pusa.backbones import DEFAULT_BACKBONE, find_family
from pusa.errors import TableError

OUTPUT = Group("Output", validator=MutuallyExclusive(), sort_key=9)


def inspect(
    table: File,
    /,
    *,
    json_: Annotated[bool, Parameter(name="--json", group=OUTPUT)] = False,
    html: Annotated[Path | None, Parameter(converter=as_written, group=OUTPUT, metavar="FILE")] = None,
    limit: Count = 100,
    decode: Annotated[Count, Parameter(metavar="ROWS")] = 0,
    weights: Annotated[str | None, Parameter(converter=as_written, metavar="NAME")] = None,
) -> int:
    """Report what a table of clips or latents holds, and write a page that shows it; or how a video was made.

    Of a damaged table, what can be read is reported; then the command names what cannot, and ends with exit code 3.
    Of a video, its own words are shown, wherever it lies: no page is written, and nothing is decoded.

    Args:
        table: A folder such as RUN/clips or RUN/latents, or an mp4 of `pusa generate`.
        json_: Print one JSON object instead, and write nothing.
        html: The file of the page; default TABLE/inspect.html.
        limit: The number of clips with pictures on the page.
        decode: Decode this number of rows of latents.
        weights: The model to decode with, where the table does not record it.
    """
    from pusa.inspect.inspection import inspect, require_page
    from pusa.inspect.video import inspect_video

    if weights and not decode:
        raise TableError(f"--weights {weights} only names the model to decode with; add --decode ROWS")
    if table.is_file():
        if html or decode:
            raise TableError(f"{table} is a file; --html and --decode are for tables, which are folders")
        found = inspect_video(table)
        show(json.dumps(found.json(), indent=2) if json_ else found.text())
        return 0
    log_to_console()
    page = html or table / "inspect.html"
    if not json_:
        require_page(page)
    inspection = inspect(table, decode, weights)
    if json_:
        show(json.dumps(inspection.json(), indent=2, allow_nan=False))
    else:
        show(inspection.text())
        inspection.write(page, limit)
        show(page)
    inspection.require_readable()
    return 0


def import_latents(
    folder: File,
    /,
    *,
    to: Annotated[File, Parameter(metavar="TABLE")],
    weights: Annotated[Text, Parameter(metavar="NAME")],
    backbone: Annotated[Text, Parameter(metavar="NAME")] = DEFAULT_BACKBONE,
    text_encoder: Annotated[str | None, Parameter(converter=as_written, metavar="NAME")] = None,
    fps: Annotated[float | None, Parameter(converter=to_positive)] = None,
    shard_rows: Count = 32,
    compression: Literal["zstd", "none"] = "zstd",
    verify: bool = False,
) -> int:
    """Make a latents table from torch files in the layout of a published data set.

    V1.0's files hold normalised latents without a variance; the command says so, and so does the table.

    Args:
        folder: A folder with videos/**/X.latent.pt, and X.embed.pt beside them or in captions/**/; or one with
            train/**/X.tensors.pth and metadata.csv, as V1.0's.
        to: The latents table to make.
        weights: The model whose VAE and text encoder made the files; the files do not record it.
        backbone: The family of that model, a name that `pusa list backbones` prints.
        text_encoder: A model with T5, where the weights have none.
        fps: The frame rate of the clips, which the files do not record; default: the family's own.
        shard_rows: The number of rows in a file.
        compression: The compression of the files.
        verify: Hash all existing shards, to find damaged ones.
    """
    from pusa.exchange.importing import Settings, import_latents
    from pusa.manifest.models import ModelSpec

    rate = fps or find_family(backbone).job.fps
    model = ModelSpec(backbone=backbone, weights=weights, text_encoder=text_encoder).resolve_paths(to)
    log_to_console()
    result = import_latents(folder, to, Settings(model, rate, shard_rows, compression, verify))
    print_result(result)
    result.require_all()
    return 0


def export_latents(table: File, folder: File, /, *, captions: bool = False) -> int:
    """Write a latents table as torch files in the layout of the published data set.

    Args:
        table: A latents table, such as RUN/latents.
        folder: A new folder, or one in which the same export was begun.
        captions: Also write captions/X.txt.
    """
    from pusa.exchange.exporting import export_latents

    log_to_console()
    result = export_latents(table, folder, captions)
    print_result(result)
    result.require_all()
    return 0
