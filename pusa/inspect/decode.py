"""Decode rows of a latents table and compare them with the frames they were made from.

Shapes: C channels, F latent frames, h, w latent height and width; frames (T, H, W, 3) uint8.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from pusa.data.latents import Latents
from pusa.data.reader import Table
from pusa.errors import NotFiniteError, Rejected, TableError
from pusa.inspect.facts import LatentsFacts, read_facts
from pusa.inspect.formatting import format_decibels, format_number, format_range, format_table
from pusa.inspect.pictures import film_strip, read_source, spread_indices
from pusa.manifest.models import ModelSpec
from pusa.system.progress import track
from pusa.system.text import printable
from pusa.video.compare import psnr
from pusa.weights.model import Model

USUAL_AVERAGE = (-5.0, 5.0)  # of all of a row's normalised latents, which are about N(0, 1)
USUAL_STD = (0.3, 3.0)
USUAL_MEAN = (-20.0, 20.0)  # of each value; those of the tiny VAE reach 8
USUAL_LOGVAR = (-30.0, 5.0)  # the VAEs clamp it at -30
HEAD = ("clip", "PSNR", "worst frame", "not finite", "mean", "std", "logvar", "flags")


@dataclass(frozen=True)
class Ranges:
    """The ranges of a row's finite values: of the mean normalised, of the log-variance as stored.

    `not_finite` also counts values that are not finite only after they are normalised.
    """

    not_finite: int
    mean_min: float | None
    mean_max: float | None
    mean_average: float | None
    mean_std: float | None
    logvar_min: float | None
    logvar_max: float | None

    @property
    def flags(self) -> list[str]:
        """Sentences about values that are unusual for latents of video."""
        usual = [
            ("mean", self.mean_min, self.mean_max, USUAL_MEAN),
            ("average", self.mean_average, self.mean_average, USUAL_AVERAGE),
            ("std", self.mean_std, self.mean_std, USUAL_STD),
            ("logvar", self.logvar_min, self.logvar_max, USUAL_LOGVAR),
        ]
        flags = [f"{self.not_finite:,} values are not finite"] if self.not_finite else []
        for name, low, high, (least, most) in usual:
            if low is not None and high is not None and not least <= low <= high <= most:
                flags.append(f"{name} is not within {format_range(least, most)}")
        return flags


@dataclass(frozen=True)
class DecodedRow:
    """A decoded row: its ranges, its PSNR if the source still exists, and strips of frames, decoded and source.

    Of a row that `is_unreadable`, its note says why.
    """

    clip_id: str
    caption: str
    ranges: Ranges
    psnr: float | None = None
    worst_frame_psnr: float | None = None
    worst_frame: int | None = None
    note: str = ""  # why there is no PSNR
    strips: tuple[Image.Image, ...] = field(default=(), repr=False)
    is_unreadable: bool = False

    def json(self) -> dict[str, Any]:
        """Return everything except the pictures."""
        fields = ("clip_id", "psnr", "worst_frame_psnr", "worst_frame", "note")
        return {name: getattr(self, name) for name in fields} | asdict(self.ranges) | {"flags": self.ranges.flags}

    def cells(self) -> list[str]:
        """Return the cells of a text table with the columns `HEAD`."""
        ranges = self.ranges
        return [
            printable(self.clip_id, 48),
            format_decibels(self.psnr),
            format_decibels(self.worst_frame_psnr),
            str(ranges.not_finite),
            format_range(ranges.mean_min, ranges.mean_max),
            format_number(ranges.mean_std),
            format_range(ranges.logvar_min, ranges.logvar_max),
            "; ".join(ranges.flags) or "-",
        ]


def decode_rows(table: Table, count: int, weights: str | None = None) -> list[DecodedRow]:
    """Decode rows with the VAE that made them.

    Args:
        table: a latents table.
        count: the number of rows, evenly spread; at least one of each bucket is decoded.
        weights: the model whose VAE is used, instead of the recorded one.

    Raises:
        TableError: no weights are recorded or given, or their VAE is not the one that made the latents.
        WeightsError: the VAE cannot be found.
    """
    model, latents = load_recorded_model(table, weights), Latents(table)
    rows = table.read("rows")
    chosen = choose_rows(latents.buckets, count)
    clips = rows.take(chosen).to_pylist()
    rows_and_clips = track(zip(chosen, clips, strict=True), "decode", len(chosen))
    return [_decode_row(row, clip, latents, model) for row, clip in rows_and_clips]


def load_recorded_model(table: Table, weights: str | None) -> Model:
    """Return the model that made a table's latents.

    Raises:
        TableError: as `decode_rows`.
    """
    facts = read_facts(table, LatentsFacts)
    recorded, expected = facts.weights, (facts.made_with or {}).get("vae")
    if weights is None and recorded is None:
        raise TableError(f"{table.folder} does not record the weights that made it; name them with --weights")
    try:
        spec = ModelSpec.model_validate((recorded or {}) | ({"weights": weights} if weights else {}))
    except ValidationError as error:
        raise TableError(f"{table.folder} records invalid weights: {recorded!r:.200}") from error
    model = Model(spec)
    fingerprint = model.fingerprints("vae")["vae"]
    if expected and fingerprint != expected:
        raise TableError(f"{spec.weights} has the VAE {fingerprint}; {table.folder} was made with {expected}")
    return model


def choose_rows(buckets: Mapping[str, Sequence[int]], count: int) -> list[int]:
    """Return `count` evenly spread rows, or more if there are more buckets, so that every bucket has a row."""
    middles = {rows[len(rows) // 2] for rows in buckets.values()}
    others = [row for rows in buckets.values() for row in rows if row not in middles]
    return sorted(middles | {others[place] for place in spread_indices(len(others), max(0, count - len(middles)))})


def format_decoded(decoded: Sequence[DecodedRow]) -> str:
    """Return the rows as a table of text, and below it why rows have no PSNR."""
    notes = [f"{printable(row.clip_id, 48)}: {printable(row.note)}" for row in decoded if row.note]
    return "\n".join([format_table(HEAD, [row.cells() for row in decoded]), *notes])


def measure_ranges(mean_CFhw: Tensor, logvar_CFhw: Tensor, normalised_CFhw: Tensor) -> Ranges:
    """Return the ranges of one row's values; `normalised` is the mean, normalised by the VAE's statistics.

    Computed in fp64, since squares of large fp32 values would be infinite in fp32.
    """
    mean_finite, logvar_finite = mean_CFhw.isfinite() & normalised_CFhw.isfinite(), logvar_CFhw.isfinite()
    not_finite = int((~mean_finite).sum()) + int((~logvar_finite).sum())
    mean, logvar = normalised_CFhw[mean_finite].double(), logvar_CFhw[logvar_finite].double()
    mean_ranges: Sequence[float | None] = [None] * 4
    logvar_ranges: Sequence[float | None] = [None] * 2
    if len(mean):
        mean_ranges = [float(value) for value in (mean.min(), mean.max(), mean.mean(), mean.std(correction=0))]
    if len(logvar):
        logvar_ranges = [float(logvar.min()), float(logvar.max())]
    return Ranges(not_finite, *mean_ranges, *logvar_ranges)


def _decode_row(row: int, clip: Mapping[str, Any], latents: Latents, model: Model) -> DecodedRow:
    try:
        mean, logvar = (part[0] for part in latents.posterior([row], finite=False))
    except TableError as error:
        unknown = Ranges(0, None, None, None, None, None, None)
        return DecodedRow(clip["clip_id"], clip["caption"], unknown, note=str(error), is_unreadable=True)
    about = (clip["clip_id"], clip["caption"], measure_ranges(mean, logvar, latents.space.enter(mean.double())))
    if not mean.isfinite().all():
        return DecodedRow(*about, note="the mean is not finite, so it is not decoded")
    try:
        video = model.decode_stored(mean)
    except NotFiniteError as error:
        return DecodedRow(*about, note=str(error))
    try:
        source = read_source(clip, clip["frames"], fitted=True)
    except Rejected as reject:
        return DecodedRow(*about, note=f"no PSNR: {reject.detail}", strips=(film_strip(video),))
    if source.shape != video.shape:
        note = f"no PSNR: the row decodes to {_describe_shape(video)}, the fitted source has {_describe_shape(source)}"
        return DecodedRow(*about, note=note, strips=(film_strip(video), film_strip(source)))
    frames = [psnr(a, b) for a, b in zip(video, source, strict=True)]
    worst = int(np.argmin(frames))
    return DecodedRow(*about, psnr(video, source), frames[worst], worst, strips=(film_strip(video), film_strip(source)))


def _describe_shape(video: np.ndarray) -> str:
    count, height, width = video.shape[:3]
    return f"{count} frames of {width}x{height}"
