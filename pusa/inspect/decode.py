"""Latents decoded and held against the frames they were made from.

Shapes: C channels, F latent frames, h, w latent height and width; frames (T, H, W, 3) uint8.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from pusa.data.latents import Latents
from pusa.data.reader import Table
from pusa.errors import Rejected, TableError
from pusa.inspect.facts import LatentsFacts, facts_of, read_part
from pusa.inspect.pictures import film, read_source
from pusa.inspect.summary import between, columns, decibels, short, spread
from pusa.manifest.models import ModelSpec
from pusa.system.progress import track
from pusa.system.text import printable
from pusa.video.compare import psnr
from pusa.weights.model import Model

USUAL_AVERAGE = (-5.0, 5.0)  # of a row's normalised latents, which are about N(0, 1)
USUAL_STD = (0.3, 3.0)
USUAL_MEAN = (-20.0, 20.0)  # of each value: the tiny VAE's go to 8
USUAL_LOGVAR = (-30.0, 5.0)  # the VAEs cut it off at -30
HEAD = ("clip", "PSNR", "worst frame", "not finite", "mean", "std", "logvar", "flags")


@dataclass(frozen=True)
class Ranges:
    """What values a row's latents have, of those that are finite: the mean's normalised, the log-variance's not.

    Values are not finite that are not, or that are not once normalised.
    """

    not_finite: int
    mean_min: float | None
    mean_max: float | None
    mean_average: float | None
    mean_std: float | None
    logvar_min: float | None
    logvar_max: float | None

    @property
    def told_std(self) -> str:
        """The standard deviation, if there is one."""
        return short(self.mean_std)

    @property
    def flags(self) -> list[str]:
        """What is unlike latents that a VAE makes of video, a sentence each."""
        usual = [
            ("mean", self.mean_min, self.mean_max, USUAL_MEAN),
            ("average", self.mean_average, self.mean_average, USUAL_AVERAGE),
            ("std", self.mean_std, self.mean_std, USUAL_STD),
            ("logvar", self.logvar_min, self.logvar_max, USUAL_LOGVAR),
        ]
        found = [f"{self.not_finite:,} values are not finite"] if self.not_finite else []
        for name, low, high, (least, most) in usual:
            if low is not None and high is not None and not least <= low <= high <= most:
                found.append(f"{name} is not within {between(least, most)}")
        return found


@dataclass(frozen=True)
class Decoded:
    """A row decoded: how like its source it is, if that is still there, and strips of both, the decoded one first."""

    clip_id: str
    caption: str
    ranges: Ranges
    psnr: float | None = None
    worst_frame_psnr: float | None = None
    worst_frame: int | None = None
    note: str = ""  # why there is no PSNR
    strips: tuple[Image.Image, ...] = field(default=(), repr=False)

    def json(self) -> dict[str, Any]:
        """All but the pictures."""
        told = {name: getattr(self, name) for name in ("clip_id", "psnr", "worst_frame_psnr", "worst_frame", "note")}
        return told | asdict(self.ranges) | {"flags": self.ranges.flags}

    def cells(self) -> list[str]:
        """For a table under `HEAD`."""
        ranges = self.ranges
        return [
            printable(self.clip_id, 48),
            decibels(self.psnr),
            decibels(self.worst_frame_psnr),
            str(ranges.not_finite),
            between(ranges.mean_min, ranges.mean_max),
            ranges.told_std,
            between(ranges.logvar_min, ranges.logvar_max),
            "; ".join(ranges.flags) or "-",
        ]


def decode_rows(table: Table, count: int, weights: str | None = None) -> list[Decoded]:
    """Decode rows with the VAE that made them.

    Args:
        table: of latents.
        count: how many rows, evenly spread; at least one of each bucket.
        weights: the model whose VAE to use, instead of the recorded one.

    Raises:
        TableError: no weights are recorded or named, or their VAE is not the one that made the latents.
        WeightsError: the VAE is not there.
    """
    model, latents = model_of(table, weights), Latents(table)
    rows = read_part(table, "rows")
    chosen = choose(latents.buckets, count)
    clips = rows.take(chosen).to_pylist()
    pairs = zip(chosen, clips, strict=True)
    return [_decoded(row, clip, latents, model) for row, clip in track(pairs, "decode", len(chosen))]


def model_of(table: Table, weights: str | None) -> Model:
    """The model that made a table's latents.

    Raises:
        TableError: as `decode_rows`.
    """
    facts = facts_of(table, LatentsFacts)
    recorded, wanted = facts.weights, (facts.made_with or {}).get("vae")
    if weights is None and recorded is None:
        raise TableError(f"{table.folder} does not record what weights made it; name them with --weights")
    try:
        spec = ModelSpec.model_validate((recorded or {}) | ({"weights": weights} if weights else {}))
    except ValidationError as error:
        raise TableError(f"{table.folder} records weights that are none: {recorded!r:.200}") from error
    model = Model(spec)
    found = model.fingerprints("vae")["vae"]
    if wanted and found != wanted:
        raise TableError(f"{spec.weights} has the VAE {found}; {table.folder} was made with {wanted}")
    return model


def choose(buckets: Mapping[str, Sequence[int]], count: int) -> list[int]:
    """`count` rows, evenly spread; more only where there are more buckets, of each of which there is one."""
    middles = {rows[len(rows) // 2] for rows in buckets.values()}
    others = [row for rows in buckets.values() for row in rows if row not in middles]
    return sorted(middles | {others[place] for place in spread(len(others), max(0, count - len(middles)))})


def told(decoded: Sequence[Decoded]) -> str:
    """A table, and below it why rows have no PSNR."""
    notes = [f"{printable(row.clip_id, 48)}: {printable(row.note)}" for row in decoded if row.note]
    return "\n".join([columns(HEAD, [row.cells() for row in decoded]), *notes])


def ranges_of(mean_CFhw: Tensor, logvar_CFhw: Tensor, normalised_CFhw: Tensor) -> Ranges:
    """Count and measure one row's values; `normalised` is the mean by the VAE's statistics.

    In fp64: squares of what fp32 holds would be infinite in fp32.
    """
    usable = mean_CFhw.isfinite() & normalised_CFhw.isfinite(), logvar_CFhw.isfinite()
    wrong = sum(int((~part).sum()) for part in usable)
    values, logvar = normalised_CFhw[usable[0]].double(), logvar_CFhw[usable[1]].double()
    low, high, average, std = (_measure(values, of) for of in (Tensor.min, Tensor.max, Tensor.mean, _std))
    return Ranges(wrong, low, high, average, std, _measure(logvar, Tensor.min), _measure(logvar, Tensor.max))


def _measure(values: Tensor, of: Callable[[Tensor], Tensor]) -> float | None:
    return float(of(values)) if len(values) else None


def _std(values: Tensor) -> Tensor:
    return values.std(correction=0)


def _decoded(row: int, clip: Mapping[str, Any], latents: Latents, model: Model) -> Decoded:
    mean, logvar = (part[0] for part in latents.posterior([row]))
    about = (clip["clip_id"], clip["caption"], ranges_of(mean, logvar, latents.space.enter(mean.double())))
    if not mean.isfinite().all():
        return Decoded(*about, note="the mean is not finite, so it is not decoded")
    video = model.decode_stored(mean)
    try:
        source = read_source(clip, clip["frames"], fitted=True)
    except Rejected as reject:
        return Decoded(*about, note=f"no PSNR: {reject.detail}", strips=(film(video),))
    if source.shape != video.shape:
        note = f"no PSNR: the row decodes to {_shape(video)}, its source's cut is {_shape(source)}"
        return Decoded(*about, note=note, strips=(film(video), film(source)))
    frames = [psnr(a, b) for a, b in zip(video, source, strict=True)]
    worst = int(np.argmin(frames))
    return Decoded(*about, psnr(video, source), frames[worst], worst, strips=(film(video), film(source)))


def _shape(video: np.ndarray) -> str:
    count, height, width = video.shape[:3]
    return f"{count} frames of {width}x{height}"
