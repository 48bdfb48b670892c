"""What the dashboard shows of a stage: tables, the loss curve, and pictures."""

import base64
import math
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from prefect.artifacts import create_markdown_artifact, create_table_artifact

from pusa.finetune.curve import loss_curve
from pusa.finetune.metrics import read_columns
from pusa.generate.stage import Generated
from pusa.ingest.stage import Ingested
from pusa.precompute.stage import Precomputed
from pusa.video.media import read_image

STRETCHES = 10
COLUMNS = ("step", "loss", "learning_rate", "samples_per_second", "seconds", "waited")
Columns = Mapping[str, np.ndarray]  # of steps, by their names in the metrics
COLOURS = 64
THUMBNAIL = (1200, 1600)  # pixels
THUMBNAIL_BYTES = 200_000


def ingest(result: Ingested) -> None:
    """How many sources came to what."""
    _table("ingest", "Clips", sources=result.sources, clips=result.clips, rejects=result.rejects,
           retimed_frames=result.retimed_frames, duplicates=result.duplicates,
           near_duplicates=result.near_duplicates, table=str(result.table))  # fmt: skip


def precompute(result: Precomputed) -> None:
    """How many clips came to what."""
    _table("precompute", "Latents", clips=result.clips, rows=result.rows, rejects=result.rejects,
           newly_encoded=result.encoded, table=str(result.table))  # fmt: skip


def finetune(run_dir: Path) -> None:
    """How training goes, and the latest validation sheet, if there is one; also while it is still going on."""
    create_markdown_artifact(training_text(run_dir), key="finetune", description="Loss")
    if (text := validation_text(run_dir)) is not None:
        create_markdown_artifact(text, key="validation", description="Videos of the latest checkpoint")


def training_text(run_dir: Path) -> str:
    """The loss as a curve, and `STRETCHES` stretches of the run in numbers."""
    columns = read_columns(run_dir / "metrics.jsonl", COLUMNS)
    steps = columns["step"]
    if not len(steps):
        return f"`{run_dir}`: no step yet"
    # A third of the size; median cut would give the inks of line and letters one colour between them.
    picture = loss_curve(steps, columns["loss"]).quantize(COLOURS, Image.Quantize.MAXCOVERAGE)
    length = -(-len(steps) // STRETCHES)
    stretches = [
        {name: column[i : i + length] for name, column in columns.items()} for i in range(0, len(steps), length)
    ]
    table = [
        "| up to step | loss | learning rate | clips a second | waiting for data | skipped |",
        "|---|---|---|---|---|---|",
    ]
    heading = f"`{run_dir}`, step {steps[-1]:.0f}"
    return "\n".join(
        [heading, "", _inline("loss", "png", _encoded(picture, "PNG")), "", *table, *map(_stretch, stretches)]
    )


def validation_text(run_dir: Path) -> str | None:
    """The sheet of the latest step that has one, made small; None where there is none."""
    sheets = sorted(run_dir.glob("validation/" + "[0-9]" * 8 + ".jpg"))
    if not sheets:
        return None
    picture = Image.fromarray(read_image(sheets[-1])[0])
    picture.thumbnail(THUMBNAIL)
    return f"Step {int(sheets[-1].stem)}: `{sheets[-1]}`\n\n{_inline('validation', 'jpeg', _small(picture))}"


def _stretch(columns: Columns) -> str:
    """A line of the table; what was not noted is left open."""
    waited, seconds = _mean(columns["waited"]), _mean(columns["seconds"])
    cells = [
        f"{columns['step'][-1]:.0f}",
        _told(_mean(columns["loss"]), ".4f"),
        _told(columns["learning_rate"][-1], ".3g"),
        _told(_mean(columns["samples_per_second"]), ".3g"),
        _told(waited / seconds if seconds else math.nan, ".0%"),
        str(np.isnan(columns["loss"]).sum()),
    ]
    return f"| {' | '.join(cells)} |"


def _mean(values: np.ndarray) -> float:
    """Of those that were noted; NaN where none was."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan


def _told(value: float, how: str) -> str:
    return "-" if math.isnan(value) else format(value, how)


def _small(picture: Image.Image) -> bytes:
    """A JPEG of at most `THUMBNAIL_BYTES`, however much is on it."""
    while len(jpeg := _encoded(picture, "JPEG")) > THUMBNAIL_BYTES:
        picture = picture.resize((picture.width * 4 // 5, picture.height * 4 // 5))
    return jpeg


def _encoded(picture: Image.Image, kind: str) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, kind, optimize=True)
    return buffer.getvalue()


def _inline(name: str, kind: str, picture: bytes) -> str:
    """A picture as a data: URL, which markdown shows."""
    return f"![{name}](data:image/{kind};base64,{base64.b64encode(picture).decode()})"


def generate(result: Generated) -> None:
    """What was made, kept and failed, and the sheet of strips in one picture."""
    counts = f"{len(result.made)} made, {len(result.kept)} kept, {len(result.failed)} failed: `{result.gallery}`"
    failures = [f"- **{id}** failed: {reason}" for id, reason in result.failed.items()]
    text = "\n".join([counts, "", *failures, "", _inline("videos", "jpeg", result.sheet.read_bytes())])
    create_markdown_artifact(text, key="generate", description="Videos")


def _table(key: str, description: str, **row: object) -> None:
    create_table_artifact([row], key=key, description=description)
