"""Turn a condition of a job into given latents: open its input, choose the frames to encode, place their latents.

Frames are (T, H, W, 3) uint8, latents (C, F, h, w) in the transformer's space.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from pusa.backbones.family import Geometry
from pusa.diffusion.sampler import Given
from pusa.errors import ConditionError, MediaError
from pusa.generate.latents import LATENTS_SUFFIX, read_header, read_latents
from pusa.generate.outputs import NO_OUTPUTS, Outputs
from pusa.tasks.base import Condition, Job, resolve_positions
from pusa.video.fit import fit_frames
from pusa.video.media import count_pictures, nearest_frames, probe, read_fitted, read_image, require_file
from pusa.weights.model import Model

SAME_RATE = 2e-3  # relative difference of frame rates below which a clip is read frame by frame: 23.976 counts as 24


class Input(ABC):
    """A picture, clip or latents file that a condition names. It exists, is of a usable kind, and is long enough."""

    @abstractmethod
    def check(self) -> None:
        """Check what only reading the whole file can show.

        Raises:
            MediaError: the file is damaged.
        """

    @abstractmethod
    def latents(self, model: Model) -> Tensor:
        """Return latents (C, F, h, w), encoding pixels if necessary.

        Raises:
            MediaError: the file cannot be read.
            ConditionError: its latents do not fit the model.
        """

    @property
    @abstractmethod
    def num_frames(self) -> int:
        """Return how many frames are encoded.

        Raises:
            ConditionError: the file holds latents, which have no pixels.
        """

    @abstractmethod
    def pixels(self, frames: Sequence[int] | None = None) -> np.ndarray:
        """Return the frames (T, H, W, 3) that are encoded, or only those at `frames`, fitted to the job's size.

        Raises:
            MediaError: the file cannot be read.
            ConditionError: the file holds latents, which have no pixels.
        """


class PixelInput(Input):
    """Frames that the VAE encodes, fitted to the size of a job."""

    job: Job

    @abstractmethod
    def content(self, hash_of: Callable[[Path], str]) -> list[Any]:
        """Identify the frames by JSON values: the hashes of the files, and the frames that are read."""

    def identity(self, hash_of: Callable[[Path], str]) -> list[Any]:
        """Return everything that decides the pixels, as JSON values; equal ones give equal pixels."""
        job = self.job
        return [type(self).__name__, self.content(hash_of), job.width, job.height, job.fit, job.background]

    def latents(self, model: Model) -> Tensor:
        """Encode the frames to (C, F, h, w)."""
        return model.encode(self.pixels())


@dataclass(frozen=True)
class PictureInput(PixelInput):
    """A still picture: one frame, one latent frame."""

    path: Path
    job: Job

    def content(self, hash_of: Callable[[Path], str]) -> list[Any]:
        """Return the hash of the file."""
        return [hash_of(self.path)]

    def __str__(self) -> str:
        count = count_pictures(self.path)
        return self.path.name if count == 1 else f"{self.path.name} (the first of {count} pictures)"

    def check(self) -> None:
        """Decode the picture."""
        read_image(self.path, self.job.background)

    @property
    def num_frames(self) -> int:
        """Return 1."""
        return 1

    def pixels(self, frames: Sequence[int] | None = None) -> np.ndarray:
        """Return the picture as (1, H, W, 3)."""
        job = self.job
        return fit_frames(read_image(self.path, job.background), job.width, job.height, job.fit, job.background)


@dataclass(frozen=True)
class FrameRange:
    """Frames of one video file, and the file's own length and rate."""

    path: Path
    frames: tuple[int, ...]
    file_frames: int
    fps: float
    job_fps: float

    def __str__(self) -> str:
        frames = f"frames {self.frames[0]}..{self.frames[-1]}" if len(self.frames) > 1 else f"frame {self.frames[0]}"
        return f"{self.path.name} {frames} of {self.file_frames}{self.rate_note}"

    @property
    def rate_note(self) -> str:
        """Return ", <fps> fps read at <fps> fps", or nothing if the file has the job's rate."""
        return "" if self.fps == self.job_fps else f", {self.fps:g} fps read at {self.job_fps:g} fps"

    def first(self, count: int) -> "FrameRange":
        """Return the first `count` of the frames."""
        return replace(self, frames=self.frames[:count])

    def last(self, count: int) -> "FrameRange":
        """Return the last `count` of the frames; `count` is 1 or more."""
        return replace(self, frames=self.frames[-count:])


@dataclass(frozen=True)
class ClipInput(PixelInput):
    """Frame ranges that are encoded as one clip: one range, or two that are joined."""

    ranges: tuple[FrameRange, ...]
    job: Job

    def content(self, hash_of: Callable[[Path], str]) -> list[Any]:
        """Return the hash of each range's file, and the numbers of the frames."""
        return [[hash_of(part.path), part.frames] for part in self.ranges]

    def __str__(self) -> str:
        return " + ".join(map(str, self.ranges))

    def check(self) -> None:
        """Check nothing: whether all frames can be decoded shows when the job is made."""

    @property
    def num_frames(self) -> int:
        """Return how many frames all ranges have."""
        return sum(len(part.frames) for part in self.ranges)

    def pixels(self, frames: Sequence[int] | None = None) -> np.ndarray:
        """Return the frames of all ranges, one after another, or only those at `frames`, as (T, H, W, 3)."""
        job = self.job
        chosen = [(part.path, number) for part in self.ranges for number in part.frames]
        chosen = chosen if frames is None else [chosen[i] for i in frames]
        by_file = [(path, [number for _, number in group]) for path, group in groupby(chosen, lambda frame: frame[0])]
        read = partial(read_fitted, width=job.width, height=job.height, fit=job.fit, background=job.background)
        return np.concatenate([read(path, numbers) for path, numbers in by_file])


@dataclass(frozen=True)
class LatentsInput(Input):
    """Latents that generation kept beside a video."""

    path: Path
    latent_frames: int
    space_name: str

    def __str__(self) -> str:
        return f"{self.path.name} ({self.latent_frames} latent frames)"

    def check(self) -> None:
        """Check that the values are those that were written, and finite."""
        read_latents(self.path)

    def require_space(self, space_name: str) -> None:
        """Check that the latents are of a model's latent space.

        Raises:
            ConditionError: they are of another.
        """
        if self.space_name != space_name:
            raise ConditionError(
                f"{self.path.name} has latent space {self.space_name!r}; expected {space_name!r}, the model's"
            )

    @property
    def num_frames(self) -> int:
        """Raise ConditionError, as `pixels`."""
        return len(self.pixels())

    def pixels(self, frames: Sequence[int] | None = None) -> np.ndarray:
        """Raise ConditionError: there are no pixels."""
        raise ConditionError(f"`exact` needs pixels to put back; {self.path.name} holds latents, which have none")

    def latents(self, model: Model) -> Tensor:
        """Return the latents unchanged."""
        self.require_space(model.space_name)
        return read_latents(self.path).float()


def place_latents(condition: Condition, latents_CFhw: Tensor, latent_frames: int) -> Given:
    """Return the latent frames that a condition takes of its source's latents, with their places and multipliers.

    Args:
        condition: one of a pass of a job.
        latents_CFhw: the latents of its source; without a source, those of the pass before.
        latent_frames: the number of latent frames of the result.

    Raises:
        ConditionError: a latent frame that it takes, or a place, does not exist.
    """
    take = resolve_positions(condition.take, latents_CFhw.shape[1], "latent frame")
    place = resolve_positions(condition.place, latent_frames, "position")
    return Given(latents_CFhw[:, list(take)], place, condition.multipliers)


def pinned_indices(condition: Condition) -> list[int]:
    """Return which latent frames of a condition's input have multiplier 0, which keeps them unchanged."""
    if condition.source is None:
        return []
    return [i for i, multiplier in enumerate(condition.multipliers) if multiplier == 0]


def open_input(condition: Condition, job: Job, geometry: Geometry, outputs: Outputs = NO_OUTPUTS) -> Input:
    """Open the file or files that a condition names: a picture, one or two clips, or latents.

    A file of `outputs` is taken as its job will write it: it may be missing, or an older one.

    Raises:
        MediaError: a file is missing, or not of the expected kind.
        ConditionError: it is too short for the latent frames that are taken, or of another size.
    """
    assert condition.source is not None
    if condition.still:
        if outputs.writer_of(condition.source):
            raise MediaError(f"{condition.source} is not a picture: it is the result of another job")
        require_file(condition.source)
        return PictureInput(condition.source, job)
    if LATENTS_SUFFIX in (condition.source.suffix, condition.joined and condition.joined.suffix):
        return _open_latents(condition, job, geometry, outputs)
    return ClipInput(_choose_frames(condition, job, geometry, outputs), job)


def _choose_frames(condition: Condition, job: Job, geometry: Geometry, outputs: Outputs) -> tuple[FrameRange, ...]:
    """Return the frames to encode, cut to a whole number of latent frames.

    From the start of a clip, as many as the last latent frame that is taken needs; from its end, the most that fit into
    the result.
    """
    sources = [path for path in (condition.source, condition.joined) if path is not None]
    readable = [_readable_frames(source, condition, job, outputs) for source in sources]
    total = len(readable[0].frames)
    if condition.joined:
        total = 2 * min((job.num_frames + 1) // 2, *(len(part.frames) for part in readable))
    names = " + ".join(f"{part.path.name} ({len(part.frames)} frames to read{part.rate_note})" for part in readable)
    latent_frames = geometry.latent_frames(total)
    resolve_positions(condition.take, latent_frames, f"{names}: latent frame")
    count = geometry.num_frames(latent_frames)
    if condition.joined:
        return readable[0].first((count + 1) // 2), readable[1].first(count // 2)
    if condition.from_end:
        return (readable[0].last(min(count, job.num_frames)),)
    if min(condition.take) >= 0:  # the VAE is causal: later frames change nothing
        return (readable[0].first(geometry.num_frames(max(condition.take) + 1)),)
    return (readable[0].first(min(count, job.num_frames)),)


def _readable_frames(path: Path, condition: Condition, job: Job, outputs: Outputs) -> FrameRange:
    """Return the frames from `first_frame` to the end of a file, picked at the job's rate from the file's average."""
    if writer := outputs.writer_of(path):
        num_frames, file_fps = writer.num_frames - writer.cyclic, writer.fps
    else:
        facts = probe(path)
        num_frames, file_fps = facts.num_frames, facts.fps
    first = condition.first_frame + num_frames * (condition.first_frame < 0)
    if not 0 <= first < num_frames:
        allowed = f"{-num_frames}..{num_frames - 1}"
        raise ConditionError(f"first_frame {condition.first_frame} is outside {path.name}; allowed are {allowed}")
    fps = job.fps if abs(file_fps / job.fps - 1) < SAME_RATE else file_fps
    steps = nearest_frames(num_frames - first, fps / job.fps)
    frames = [num_frames - 1 - s for s in reversed(steps)] if condition.from_end else [first + s for s in steps]
    return FrameRange(path, tuple(frames), num_frames, fps, job.fps)


def _open_latents(condition: Condition, job: Job, geometry: Geometry, outputs: Outputs) -> LatentsInput:
    path = condition.source
    assert path is not None
    if condition.joined:
        raise ConditionError(
            f"{path.name} and {condition.joined.name}: `encoding: joint` needs two clips; got latents, which are "
            f"encoded already"
        )
    if condition.first_frame:
        raise ConditionError(
            f"first_frame {condition.first_frame}: {path.name} holds latents, which have no first_frame; expected 0"
        )
    if writer := outputs.writer_of(path):
        header = outputs.header_of(writer, geometry)
    else:
        require_file(path)
        header = read_header(path)
    shape, facts = header.shape, header.facts
    channels, _, height, width = geometry.latent_shape(job.width, job.height, job.num_frames)
    if not header.floating or len(shape) != 4 or (shape[0], *shape[2:]) != (channels, height, width) or not shape[1]:
        raise ConditionError(
            f"{path.name} has {'' if header.floating else 'integer '}latents of shape {shape}; expected "
            f"({channels}, frames, {height}, {width}) of floats for {job.width}x{job.height}"
        )
    if facts.get("cyclic") == "true":
        raise ConditionError(
            f"{path.name} holds the latents of a loop, which have no first frame; give the loop's video instead"
        )
    if "latent_space" not in facts:
        raise ConditionError(
            f"{path.name} does not record its latent space; expected latents that generation kept beside a video"
        )
    resolve_positions(condition.take, shape[1], f"{path.name}: latent frame")
    return LatentsInput(path, shape[1], facts["latent_space"])
