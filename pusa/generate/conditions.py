"""From a condition to what is given: what kind of source it is, which of its frames are used, their latents.

Frames are (T, H, W, 3) uint8, latents (C, F, h, w) in the transformer's space.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pusa.backbones.family import Geometry
from pusa.diffusion.sampler import Given
from pusa.errors import ConditionError, MediaError
from pusa.tasks.base import Condition, Job, resolve_positions
from pusa.video.fit import fit_frames
from pusa.video.media import count_pictures, nearest_frames, probe, read_frames, read_image, require_file
from pusa.weights.model import Model

LATENTS_SUFFIX = ".safetensors"  # what generation keeps beside each video


class Source(ABC):
    """What is given, opened: it is there, of a usable kind, and long enough."""

    @abstractmethod
    def check(self) -> None:
        """Find out what only reading it whole can tell.

        Raises:
            MediaError: it is broken.
        """

    @abstractmethod
    def latents(self, model: Model) -> Tensor:
        """Its latents (C, F, h, w).

        Raises:
            MediaError: it cannot be read.
            ConditionError: it does not fit the model.
        """

    @abstractmethod
    def pixels(self) -> np.ndarray:
        """The frames that its latents are encoded from.

        Raises:
            MediaError: it cannot be read.
            ConditionError: it has none.
        """


@dataclass(frozen=True)
class Picture(Source):
    """A still picture: one frame, one latent frame."""

    path: Path
    job: Job

    def __str__(self) -> str:
        count = count_pictures(self.path)
        return self.path.name if count == 1 else f"{self.path.name} (the first of {count} pictures)"

    def check(self) -> None:
        """Decode it."""
        read_image(self.path, self.job.background)

    def pixels(self) -> np.ndarray:
        """(1, H, W, 3)."""
        return _fitted(read_image(self.path, self.job.background), self.job)

    def latents(self, model: Model) -> Tensor:
        """(C, 1, h, w)."""
        return model.encode(self.pixels())


@dataclass(frozen=True)
class Stretch:
    """Frames of one file, and the file's own length and rate."""

    path: Path
    frames: tuple[int, ...]
    of: int
    fps: float
    read_at: float
    pixel_aspect: float

    def __str__(self) -> str:
        frames = f"frames {self.frames[0]}..{self.frames[-1]}" if len(self.frames) > 1 else f"frame {self.frames[0]}"
        return f"{self.path.name} {frames} of {self.of}{self.rate}"

    @property
    def rate(self) -> str:
        """What is said of a rate that is not the job's."""
        return "" if self.fps == self.read_at else f", {self.fps:g} a second read as {self.read_at:g}"


@dataclass(frozen=True)
class Clip(Source):
    """Stretches that are encoded as one clip: one, or two that are joined."""

    stretches: tuple[Stretch, ...]
    job: Job

    def __str__(self) -> str:
        return " + ".join(map(str, self.stretches))

    def check(self) -> None:
        """Decoding is left to the making."""

    def pixels(self) -> np.ndarray:
        """(T, H, W, 3)."""
        parts = [(read_frames(part.path, part.frames), part.pixel_aspect) for part in self.stretches]
        return np.concatenate([_fitted(frames, self.job, pixel_aspect) for frames, pixel_aspect in parts])

    def latents(self, model: Model) -> Tensor:
        """(C, F, h, w)."""
        return model.encode(self.pixels())


@dataclass(frozen=True)
class Kept(Source):
    """Latents that generation kept beside a video."""

    path: Path
    count: int
    space: str | None

    def __str__(self) -> str:
        return f"{self.path.name} ({self.count} latent frames)"

    def check(self) -> None:
        """See that all numbers are numbers."""
        if not self._read().isfinite().all():
            raise MediaError(f"{self.path} holds latents that are not finite")

    def pixels(self) -> np.ndarray:
        """None."""
        raise ConditionError(f"exact wants pixels to put back; {self.path.name} holds latents")

    def latents(self, model: Model) -> Tensor:
        """As they are."""
        if self.space != model.space_name:
            raise ConditionError(
                f"{self.path.name} lies in the latent space {self.space!r}; wanted is {model.space_name!r}"
            )
        self.check()
        return self._read()

    def _read(self) -> Tensor:
        with safe_open(self.path, "pt") as file:
            latents: Tensor = file.get_tensor("latents")
            return latents.float()


def open_source(condition: Condition, job: Job, geometry: Geometry) -> Source:
    """What a condition names: a picture, one or two clips, or latents.

    Raises:
        MediaError: it is missing, or no such thing.
        ConditionError: it is too short for the latent frames that are taken, or of another size.
    """
    assert condition.source is not None
    if condition.still:
        require_file(condition.source)
        return Picture(condition.source, job)
    if LATENTS_SUFFIX in (condition.source.suffix, condition.joined and condition.joined.suffix):
        return _open_latents(condition, job, geometry)
    return Clip(_stretches(condition, job, geometry), job)


def _stretches(condition: Condition, job: Job, geometry: Geometry) -> tuple[Stretch, ...]:
    """Which frames are encoded: as many as fit the result, a whole number of latent frames."""
    sources = [path for path in (condition.source, condition.joined) if path is not None]
    readable = [_readable(source, condition, job) for source in sources]
    total = len(readable[0].frames)
    if condition.joined:
        total = 2 * min((job.num_frames + 1) // 2, *(len(part.frames) for part in readable))
    names = " + ".join(f"{part.path.name} ({len(part.frames)} frames to read{part.rate})" for part in readable)
    latent_frames = geometry.latent_frames(total)
    resolve_positions(condition.take, latent_frames, f"{names}: latent frame")
    count = geometry.num_frames(latent_frames)
    if condition.joined:
        return _cut(readable[0], (count + 1) // 2), _cut(readable[1], count // 2)
    if condition.from_end:
        return (_cut(readable[0], -min(count, job.num_frames)),)
    if min(condition.take) >= 0:  # the VAE is causal: later frames change nothing
        count = min(count, geometry.num_frames(max(condition.take) + 1))
    return (_cut(readable[0], min(count, job.num_frames)),)


def _readable(path: Path, condition: Condition, job: Job) -> Stretch:
    """All frames from the first to read, the nearest to the job's rate by the source's average rate."""
    facts = probe(path)
    first = condition.first_frame + facts.num_frames * (condition.first_frame < 0)
    if not 0 <= first < facts.num_frames:
        allowed = f"{-facts.num_frames}..{facts.num_frames - 1}"
        raise ConditionError(f"first_frame {condition.first_frame} is outside {path.name}; allowed are {allowed}")
    fps = job.fps if abs(facts.fps / job.fps - 1) < 2e-3 else facts.fps  # 23.976 is played as 24
    steps = nearest_frames(facts.num_frames - first, fps / job.fps)
    frames = [facts.num_frames - 1 - s for s in reversed(steps)] if condition.from_end else [first + s for s in steps]
    return Stretch(path, tuple(frames), facts.num_frames, fps, job.fps, facts.pixel_aspect)


def _cut(stretch: Stretch, count: int) -> Stretch:
    """The first so many frames, or of a negative number the last."""
    frames = stretch.frames[:count] if count > 0 else stretch.frames[count:]
    return replace(stretch, frames=frames)


def _open_latents(condition: Condition, job: Job, geometry: Geometry) -> Kept:
    path = condition.source
    assert path is not None
    if condition.joined:
        raise ConditionError(f"{path.name} and {condition.joined.name}: a joint encoding wants two clips, not latents")
    if condition.first_frame:
        raise ConditionError(f"{path.name} holds latents, which have no first_frame; give all of them, 0 to the last")
    require_file(path)
    try:
        with safe_open(path, "pt") as file:
            facts, part = file.metadata() or {}, file.get_slice("latents")
            shape, floating = tuple(part.get_shape()), part.get_dtype() in ("F64", "F32", "F16", "BF16")
    except (OSError, SafetensorError) as error:
        raise MediaError(f"{path} cannot be read as latents: {error}") from error
    channels, _, height, width = geometry.latent_shape(job.width, job.height, job.num_frames)
    if not floating or len(shape) != 4 or (shape[0], *shape[2:]) != (channels, height, width) or not shape[1]:
        raise ConditionError(
            f"{path.name} has latents of shape {shape}; wanted is ({channels}, frames, {height}, {width}) "
            f"for {job.width}x{job.height}"
        )
    if facts.get("cyclic") == "true":
        raise ConditionError(f"{path.name} is a loop's ring of latents, which has no first; take the loop's video")
    resolve_positions(condition.take, shape[1], f"{path.name}: latent frame")
    return Kept(path, shape[1], facts.get("latent_space"))


def give(condition: Condition, job: Job, model: Model, frames: int, before: Tensor | None) -> Given:
    """The latents of a condition, for a result of so many latent `frames`; without a source, from those `before`.

    Raises:
        MediaError: a source cannot be read.
        ConditionError: it does not fit the job.
    """
    if condition.source is None:
        assert before is not None
        latents_CFhw = before
    else:
        latents_CFhw = open_source(condition, job, model.backbone.geometry).latents(model)
    take = resolve_positions(condition.take, latents_CFhw.shape[1], "latent frame")
    place = resolve_positions(condition.place, frames, "position")
    return Given(latents_CFhw[:, list(take)], place, condition.multipliers)


def _fitted(frames: np.ndarray, job: Job, pixel_aspect: float = 1.0) -> np.ndarray:
    return fit_frames(frames, job.width, job.height, job.fit, job.background, pixel_aspect)
