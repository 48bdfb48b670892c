"""Artifacts for Prefect's dashboard: a table for each stage, the loss curve, and pictures of videos."""

import base64
import math
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

SECTIONS = 10  # rows of the table of a training
COLUMNS = ("step", "loss", "learning_rate", "samples_per_second", "seconds", "waited")
COLOURS = 64  # of the loss curve
THUMBNAIL = (1200, 1600)  # pixels at most
THUMBNAIL_BYTES = 200_000


def ingest(result: Ingested) -> None:
    """Report the counts of sources, clips and rejects, and the kinds of sources with what was done to them."""
    _create_table("ingest", "Clips", sources=result.sources, clips=result.clips, rejects=result.rejects,
                  retimed_frames=result.retimed_frames, duplicates=result.duplicates,
                  near_duplicates=result.near_duplicates, table=str(result.table))  # fmt: skip
    rows = [{"kind": kind, "sources, and what was done": text} for kind, text in result.kinds.items()]
    if rows:
        create_table_artifact(rows, key="kinds", description="Sources that needed more than a plain reading")


def precompute(result: Precomputed) -> None:
    """Report the counts of clips, rows and rejects."""
    _create_table("precompute", "Latents", clips=result.clips, rows=result.rows, rejects=result.rejects,
                  newly_encoded=result.encoded, table=str(result.table))  # fmt: skip


def finetune(run_dir: Path) -> None:
    """Report the progress of a training, and its latest validation sheet if there is one."""
    create_markdown_artifact(training_text(run_dir), key="finetune", description="Loss")
    if (text := validation_text(run_dir)) is not None:
        create_markdown_artifact(
            text, key="validation", description="The same clips, rendered with the latest checkpoint"
        )


def generate(result: Generated) -> None:
    """Report the counts of videos, each failure with its reason, and the contact sheet."""
    counts = f"{len(result.made)} made, {len(result.kept)} kept, {len(result.failed)} failed: `{result.gallery}`"
    failures = [f"- **{id}** failed: {reason}" for id, reason in result.failed.items()]
    text = "\n".join([counts, "", *failures, "", _inline("videos", "jpeg", result.sheet.read_bytes())])
    create_markdown_artifact(text, key="generate", description="Videos")


def training_text(run_dir: Path) -> str:
    """Return the loss as a picture and, for each of `SECTIONS` sections of the run, a row of means, as markdown."""
    columns = read_columns(run_dir / "metrics.jsonl", COLUMNS)
    steps = columns["step"]
    if not len(steps):
        return f"`{run_dir}`: no step yet"
    # Median cut would give the inks of line and letters one colour between them.
    picture = loss_curve(steps, columns["loss"]).quantize(COLOURS, Image.Quantize.MAXCOVERAGE)
    length = -(-len(steps) // SECTIONS)
    rows = [
        "| up to step | loss | learning rate | clips a second | waiting for data | skipped |",
        "|---|---|---|---|---|---|",
    ]
    for start in range(0, len(steps), length):
        section = {name: column[start : start + length] for name, column in columns.items()}
        waited, seconds = _mean(section["waited"]), _mean(section["seconds"])
        cells = [
            f"{section['step'][-1]:.0f}",
            _number(_mean(section["loss"]), ".4f"),
            _number(section["learning_rate"][-1], ".3g"),
            _number(_mean(section["samples_per_second"]), ".3g"),
            _number(waited / seconds if seconds else math.nan, ".0%"),
            str(np.isnan(section["loss"]).sum()),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    heading = f"`{run_dir}`, step {steps[-1]:.0f}"
    return "\n".join([heading, "", _inline("loss", "png", _encode(picture, "PNG")), "", *rows])


def validation_text(run_dir: Path) -> str | None:
    """Return the latest step's contact sheet, made smaller, as markdown; None if there is no sheet."""
    sheets = sorted(run_dir.glob("validation/" + "[0-9]" * 8 + ".jpg"))
    if not sheets:
        return None
    picture = Image.fromarray(read_image(sheets[-1])[0])
    picture.thumbnail(THUMBNAIL)
    while len(jpeg := _encode(picture, "JPEG")) > THUMBNAIL_BYTES:
        picture = picture.resize((picture.width * 4 // 5, picture.height * 4 // 5))
    return f"Step {int(sheets[-1].stem)}: `{sheets[-1]}`\n\n{_inline('validation', 'jpeg', jpeg)}"


def _mean(values: np.ndarray) -> float:
    """Return the mean of the finite values; NaN if there are none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


def _number(value: float, form: str) -> str:
    """Return a number as text, and "-" for one that was not recorded."""
    return "-" if math.isnan(value) else format(value, form)


def _encode(picture: Image.Image, kind: str) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, kind, optimize=True)
    return buffer.getvalue()


def _inline(name: str, kind: str, picture: bytes) -> str:
    """Return a picture as a data: URL in markdown."""
    return f"![{name}](data:image/{kind};base64,{base64.b64encode(picture).decode()})"


def _create_table(key: str, description: str, **row: object) -> None:
    create_table_artifact([row], key=key, description=description)
