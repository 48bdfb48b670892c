"""Artifacts for Prefect's dashboard: a table for each stage, the loss curve, and pictures of videos.

The dashboard shows markdown, also in the cells of its tables, so every text that is not ours goes through `markdown`.
"""

import base64
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from prefect.artifacts import create_markdown_artifact

from pusa.errors import MediaError
from pusa.finetune.curve import loss_curve
from pusa.finetune.metrics import read_columns
from pusa.generate.stage import Generated
from pusa.ingest.stage import Ingested
from pusa.precompute.stage import Precomputed
from pusa.system.text import MAX_LINES, first_line, markdown
from pusa.video.media import read_image

log = logging.getLogger("pusa.report")
SECTIONS = 10  # rows of the table of a training
COLUMNS = ("step", "loss", "learning_rate", "samples_per_second", "seconds", "waited")
COLOURS = 64  # of the loss curve
THUMBNAIL = (1200, 1600)  # pixels at most
THUMBNAIL_BYTES = 200_000


def ingest(result: Ingested) -> None:
    """Report the counts of sources, clips and rejects, and the kinds of sources with what was done to them."""
    names = ("sources", "clips", "rejects", "failed", "retimed_frames", "duplicates", "near_duplicates", "table")
    _publish("ingest", "Clips", lambda: _table(names, [[getattr(result, name) for name in names]]))
    if result.kinds:
        columns = ("kind", "sources, and what was done")
        about = "Sources that needed more than a plain reading"
        _publish("kinds", about, lambda: _table(columns, list(result.kinds.items())))


def precompute(result: Precomputed) -> None:
    """Report the counts of clips, rows and rejects."""
    names = ("clips", "rows", "rejects", "failed", "newly_encoded", "table")
    row = (result.clips, result.rows, result.rejects, result.failed, result.encoded, result.table)
    _publish("precompute", "Latents", lambda: _table(names, [row]))


def finetune(run_dir: Path) -> None:
    """Report the progress of a training that has begun, and its latest validation sheet if there is one."""
    if (run_dir / "metrics.jsonl").is_file():  # a training may fail before its first step
        _publish("finetune", "Loss", lambda: training_text(run_dir))
        about = "The same clips, rendered with the latest checkpoint"
        _publish("validation", about, lambda: validation_text(run_dir))


def generate(result: Generated) -> None:
    """Report the counts of videos, the first failures with their reasons, and the contact sheet."""
    _publish("generate", "Videos", lambda: generated_text(result))


def generated_text(result: Generated) -> str:
    """Return the counts of videos, the first failures with their reasons, and the sheet, made smaller, as markdown."""
    groups = {"made": result.made, "kept": result.kept, "failed": result.failed, "not tried": result.left}
    counts = ", ".join(f"{len(ids):,} {name}" for name, ids in groups.items() if ids or name != "not tried")
    failures = [f"- **{markdown(id)}** failed: {markdown(text)}" for id, text in [*result.failed.items()][:MAX_LINES]]
    if (more := len(result.failed) - MAX_LINES) > 0:
        failures.append(f"- and {more:,} more, each with its reason in its JSON file beside the videos")
    return "\n".join([f"{counts}: {markdown(result.gallery)}", "", *failures, "", _thumbnail("videos", result.sheet)])


def _publish(key: str, about: str, make: Callable[[], str | None]) -> None:
    """Create an artifact of a text in markdown. If that fails, a warning is logged: the work itself is done."""
    try:
        if (text := make()) is not None:
            create_markdown_artifact(text, key=key, description=about)
    except Exception as error:  # noqa: BLE001  the server, its client, a file: nothing of it is worth a stage
        log.warning("the dashboard lacks %r: %s: %s", key, type(error).__name__, first_line(error))


def training_text(run_dir: Path) -> str:
    """Return the loss as a picture and, for each of `SECTIONS` sections of the run, a row of means, as markdown."""
    columns = read_columns(run_dir / "metrics.jsonl", COLUMNS)
    steps = columns["step"]
    if not len(steps):
        return f"{markdown(run_dir)}: no step yet"
    # Median cut would give the inks of line and letters one colour between them.
    picture = loss_curve(steps, columns["loss"]).quantize(COLOURS, Image.Quantize.MAXCOVERAGE)
    length = -(-len(steps) // SECTIONS)
    names = ("up to step", "loss", "learning rate", "clips a second", "waiting for data", "skipped")
    rows = []
    for start in range(0, len(steps), length):
        section = {name: column[start : start + length] for name, column in columns.items()}
        waited, seconds = _mean(section["waited"]), _mean(section["seconds"])
        row = [
            f"{section['step'][-1]:.0f}",
            _number(_mean(section["loss"]), ".4f"),
            _number(section["learning_rate"][-1], ".3g"),
            _number(_mean(section["samples_per_second"]), ".3g"),
            _number(waited / seconds if seconds else math.nan, ".0%"),
            str(np.isnan(section["loss"]).sum()),
        ]
        rows.append(row)
    heading = f"{markdown(run_dir)}, step {steps[-1]:.0f}"
    return "\n".join([heading, "", _inline("loss", "png", _encode(picture, "PNG")), "", _table(names, rows)])


def validation_text(run_dir: Path) -> str | None:
    """Return the latest step's contact sheet, made smaller, as markdown; None if there is no sheet."""
    sheets = sorted(run_dir.glob("validation/" + "[0-9]" * 8 + ".jpg"))
    if not sheets:
        return None
    return f"Step {int(sheets[-1].stem)}: {markdown(sheets[-1])}\n\n{_thumbnail('validation', sheets[-1])}"


def _mean(values: np.ndarray) -> float:
    """Return the mean of the finite values; NaN if there are none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


def _number(value: float, form: str) -> str:
    """Return a number as text, and "-" for one that was not recorded."""
    return "-" if math.isnan(value) else format(value, form)


def _table(names: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table in markdown."""
    lines = [list(map(markdown, names)), ["---"] * len(names), *(list(map(markdown, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _thumbnail(name: str, path: Path) -> str:
    """Return a picture, made smaller, in markdown; or why it cannot be shown."""
    try:
        picture = Image.fromarray(read_image(path)[0])
    except MediaError as error:
        return f"no picture: {markdown(error)}"
    picture.thumbnail(THUMBNAIL)
    while len(jpeg := _encode(picture, "JPEG")) > THUMBNAIL_BYTES:
        picture = picture.resize((max(1, picture.width * 4 // 5), max(1, picture.height * 4 // 5)))
    return _inline(name, "jpeg", jpeg)


def _encode(picture: Image.Image, kind: str) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, kind, optimize=True)
    return buffer.getvalue()


def _inline(name: str, kind: str, picture: bytes) -> str:
    """Return a picture as a data: URL in markdown."""
    return f"![{name}](data:image/{kind};base64,{base64.b64encode(picture).decode()})"
