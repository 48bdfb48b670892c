"""From a condition to what is given: which frames of which file, their pixels, their latents.

Frames are (T, H, W, 3) uint8, latents (C, F, h, w) in the transformer's space.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pusa.backbones.base import Geometry
from pusa.errors import ConditionError, MediaError
from pusa.model import Model
from pusa.sampler import Given
from pusa.tasks.base import Condition, Job, positions
from pusa.video import fit, probe, read_frames, read_image

LATENTS_SUFFIX = ".safetensors"  # what generation keeps beside each video


@dataclass(frozen=True)
class Chosen:
    """Frames of a file, and the file's own rate and length; a picture has the one frame 0."""

    source: Path
    frames: tuple[int, ...]
    of: int = 1
    fps: float = 0.0
    read_at: float = 0.0

    def __str__(self) -> str:
        if self.of == 1:
            return self.source.name
        rate = "" if _same(self.fps, self.read_at) else f", {self.fps:g} a second read as {self.read_at:g}"
        frames = f"frames {self.frames[0]}..{self.frames[-1]}" if len(self.frames) > 1 else f"frame {self.frames[0]}"
        return f"{self.source.name} {frames} of {self.of}{rate}"


def choose(condition: Condition, job: Job, geometry: Geometry) -> list[Chosen]:
    """Which frames are encoded, as one clip: as many as fit the result, a whole number of latent frames.

    Raises:
        MediaError: a source cannot be opened.
        ConditionError: there are too few frames for the latent frames that are taken.
    """
    if condition.source is None:
        return []
    if condition.still:
        read_image(condition.source, job.background)
        return [Chosen(condition.source, (0,))]
    if condition.source.suffix == LATENTS_SUFFIX:
        count = _read_latents(condition.source)[0].shape[1]
        positions(condition.take, count, f"{condition.source.name}: latent frame")
        return [Chosen(condition.source, tuple(range(count)), count)]
    sources = [condition.source, *([condition.joined] if condition.joined else [])]
    readable = [_readable(source, condition, job) for source in sources]
    if condition.joined:
        half = min((job.num_frames + 1) // 2, *(len(chosen.frames) for chosen in readable))
        count = _whole_latents(2 * half, condition, readable, geometry)
        return [_cut(readable[0], (count + 1) // 2), _cut(readable[1], count // 2)]
    count = _whole_latents(len(readable[0].frames), condition, readable, geometry)
    if condition.from_end:
        return [_cut(readable[0], -min(count, job.num_frames))]
    if min(condition.take) >= 0:  # the VAE is causal: later frames change nothing
        count = min(count, geometry.num_frames(max(condition.take) + 1))
    return [_cut(readable[0], min(count, job.num_frames))]


def _whole_latents(total: int, condition: Condition, readable: Sequence[Chosen], geometry: Geometry) -> int:
    """How many of `total` frames make whole latent frames, which must be enough for those taken."""
    latent_frames = geometry.latent_frames(total)
    names = " + ".join(f"{chosen.source.name} ({len(chosen.frames)} frames to read)" for chosen in readable)
    positions(condition.take, latent_frames, f"{names}: latent frame")
    return geometry.num_frames(latent_frames)


def _readable(source: Path, condition: Condition, job: Job) -> Chosen:
    """All frames from the first to read, the nearest to the job's rate by the source's average rate."""
    facts = probe(source)
    first = condition.first_frame + facts.num_frames * (condition.first_frame < 0)
    if not 0 <= first < facts.num_frames:
        allowed = f"{-facts.num_frames}..{facts.num_frames - 1}"
        raise ConditionError(f"first_frame {condition.first_frame} is outside {source.name}; allowed are {allowed}")
    rate = 1.0 if _same(facts.fps, job.fps) else facts.fps / job.fps
    count = int((facts.num_frames - 1 - first) / rate + 1e-6) + 1
    steps = [round(i * rate) for i in range(count)]
    frames = [facts.num_frames - 1 - s for s in reversed(steps)] if condition.from_end else [first + s for s in steps]
    return Chosen(source, tuple(frames), facts.num_frames, facts.fps, job.fps)


def _same(fps: float, other: float) -> bool:
    """The same rate but for television's 1000/1001, which is played as if it were round."""
    return abs(fps / other - 1) < 2e-3


def _cut(chosen: Chosen, count: int) -> Chosen:
    """The first so many frames, or of a negative number the last."""
    return replace(chosen, frames=chosen.frames[:count] if count > 0 else chosen.frames[count:])


def give(condition: Condition, job: Job, model: Model, frames: int, before: Tensor | None) -> Given:
    """The latents of a condition, for a result of so many latent `frames`.

    Raises:
        MediaError: a source cannot be read.
        ConditionError: it does not fit the job.
    """
    if condition.source is None:
        assert before is not None
        latents_CFhw = before
    elif condition.source.suffix == LATENTS_SUFFIX:
        latents_CFhw, space = _read_latents(condition.source)
        _require_fit(condition.source, latents_CFhw, space, job, model)
    else:
        latents_CFhw = model.encode(pixels(condition, job, model.backbone.geometry))
    name = condition.source.name if condition.source else "the clip before"
    take = positions(condition.take, latents_CFhw.shape[1], f"{name}: latent frame")
    place = positions(condition.place, frames, "position")
    return Given(latents_CFhw[:, list(take)], place, condition.multipliers)


def pixels(condition: Condition, job: Job, geometry: Geometry) -> np.ndarray:
    """The frames that a condition's latents are encoded from.

    Raises:
        MediaError: a source cannot be read.
    """
    parts = [
        read_image(chosen.source, job.background) if condition.still else read_frames(chosen.source, chosen.frames)
        for chosen in choose(condition, job, geometry)
    ]
    return np.concatenate([fit(part, job.width, job.height, job.fit, job.background) for part in parts])


def paste(video: np.ndarray, conditions: Sequence[Condition], job: Job, geometry: Geometry) -> np.ndarray:
    """The video with the given pixels in place of those that the pinned latents (multiplier 0) decode to.

    Raises:
        ConditionError: something pinned was given as latents, which have no pixels.
    """
    video = video.copy()
    latent_frames = len(video) // geometry.temporal if job.cyclic else geometry.latent_frames(len(video))
    for condition in conditions:
        pinned = [i for i, multiplier in enumerate(condition.multipliers) if multiplier == 0]
        if not pinned or condition.source is None:
            continue
        if condition.source.suffix == LATENTS_SUFFIX:
            raise ConditionError(f"exact wants pixels to put back; {condition.source.name} holds latents")
        given = pixels(condition, job, geometry)
        take = positions(condition.take, geometry.latent_frames(len(given)), "latent frame")
        place = positions(condition.place, latent_frames, "position")
        for i in pinned:
            source, shown = _span(take[i], geometry), list(_shown(place[i], job, geometry, len(video)))
            # A picture that is shown for several frames repeats; of several frames shown as one, the last counts.
            frames = [*source, *[source[-1]] * (len(shown) - len(source))][-len(shown) :]
            video[shown] = given[frames]
    return video


def _span(latent_frame: int, geometry: Geometry) -> range:
    """The frames of a clip that a latent frame stands for."""
    last = geometry.num_frames(latent_frame + 1)
    return range(max(0, last - geometry.temporal), last)


def _shown(place: int, job: Job, geometry: Geometry, count: int) -> Iterator[int]:
    """The frames of the result that a latent frame becomes."""
    if not job.cyclic:
        yield from _span(place, geometry)
        return
    first = place * geometry.temporal - geometry.temporal // 2
    yield from ((first + i) % count for i in range(geometry.temporal))


def _read_latents(path: Path) -> tuple[Tensor, str | None]:
    """Latents that generation kept, and the space they lie in."""
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor("latents"), (file.metadata() or {}).get("latent_space")
    except (OSError, SafetensorError) as error:
        raise MediaError(f"{path} cannot be read as latents: {error}") from error


def _require_fit(path: Path, latents_CFhw: Tensor, space: str | None, job: Job, model: Model) -> None:
    if space != model.space_name:
        raise ConditionError(f"{path.name} lies in the latent space {space!r}; wanted is {model.space_name!r}")
    channels, _, *size = model.backbone.geometry.latent_shape(job.width, job.height, job.num_frames)
    found, _, *found_size = latents_CFhw.shape
    if (found, found_size) != (channels, size):
        shape = tuple(latents_CFhw.shape)
        raise ConditionError(
            f"{path.name} has latents of shape {shape}; wanted is ({channels}, frames, {size[0]}, {size[1]})"
        )
