"""Find which frames of a job's video its inputs give, their pixels, and what the VAE alone makes of their latents."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from pusa.backbones.family import Geometry
from pusa.errors import MediaError
from pusa.generate.conditions import LatentsInput, open_input, pinned_indices
from pusa.generate.encodings import Encodings, FileHashes
from pusa.generate.numbers import NOTHING, Compared, Frames
from pusa.system.failures import Failure, attempt
from pusa.system.files import sha256_file
from pusa.tasks.base import Condition, Job, resolve_positions, video_frames_of
from pusa.weights.model import Model

MOST_COMPARED = 8  # given frames of a video, evenly spread: similarity takes 0.1 s for each at 832x480
MOST_DECODED = 24  # latent frames of an input, for the round trip
MOST_KEPT = 2  # jobs whose given frames are kept for the next ones, which often have the same inputs


@dataclass(frozen=True)
class GivenInput:
    """An input of a job's last pass.

    Attributes:
        condition: what it gives.
        origins: for each frame of the video that it gives, the frame of the input.
        pinned: the frames of the video that it gives with multiplier 0.
    """

    condition: Condition
    origins: Mapping[int, int]
    pinned: frozenset[int]


def find_given(job: Job, geometry: Geometry, only_pinned: bool = False) -> list[GivenInput]:
    """Return the inputs of a job's last pass, and which frames they give.

    Args:
        job: the job.
        geometry: of the model.
        only_pinned: leave out inputs without multiplier 0. They are not opened.

    Raises:
        ConditionError, MediaError: as `open_input`.
    """
    run = job.passes(geometry)[-1]
    latent_frames = len(run.timeline.starts)
    sources = []
    for condition in run.conditions:
        if condition.source is None or (only_pinned and not pinned_indices(condition)):
            continue
        opened = open_input(condition, job, geometry)
        count = opened.latent_frames if isinstance(opened, LatentsInput) else geometry.latent_frames(opened.num_frames)
        take = resolve_positions(condition.take, count, "latent frame")
        place = resolve_positions(condition.place, latent_frames, "position")
        origins: dict[int, int] = {}
        pinned: set[int] = set()
        for taken, placed, multiplier in zip(take, place, condition.multipliers, strict=True):
            frames, target = geometry.frames_of(taken), video_frames_of(placed, latent_frames, job, geometry)
            # A picture that fills several frames repeats; of several frames that become one, the last counts.
            repeated = [*frames, *frames[-1:] * (len(target) - len(frames))]
            origins |= zip(target, repeated[-len(target) :], strict=True)
            pinned |= set(target if multiplier == 0 else ())
        sources.append(GivenInput(condition, origins, frozenset(pinned)))
    return sources


def read_pinned(job: Job, geometry: Geometry) -> Frames:
    """Return the frames of a job's video that its inputs with multiplier 0 give.

    Raises:
        ConditionError: such an input holds latents, which have no pixels.
        MediaError: it cannot be read.
    """
    given: Frames = {}
    for source in find_given(job, geometry, only_pinned=True):
        given |= _pixels(source, sorted(source.pinned), job, geometry)
    return given


def _pixels(source: GivenInput, frames: Sequence[int], job: Job, geometry: Geometry) -> Frames:
    """Return the pixels that a source gives for frames of the video."""
    needed = sorted({source.origins[frame] for frame in frames})
    pixels = dict(zip(needed, open_input(source.condition, job, geometry).pixels(needed), strict=True))
    return {frame: pixels[source.origins[frame]] for frame in frames}


def compared_frames(sources: Sequence[GivenInput]) -> list[int]:
    """Return the given frames that are compared: `MOST_COMPARED`, evenly spread with both ends, or all if fewer."""
    given = sorted({frame for source in sources for frame in source.origins})
    places = np.linspace(0, len(given) - 1, min(len(given), MOST_COMPARED)).round().astype(int)
    return [given[place] for place in places]


class GivenFrames:
    """Reads the given frames of jobs, and keeps them for the next jobs with the same inputs.

    Args:
        model: decodes latents.
        encodings: has the latents of the inputs.
        hashes: of the files, for `encodings`.
    """

    def __init__(self, model: Model, encodings: Encodings, hashes: FileHashes) -> None:
        self._model, self._encodings, self._hashes = model, encodings, hashes
        self._kept: OrderedDict[str, Compared] = OrderedDict()  # the last used at the end

    def read(self, job: Job, inputs: Mapping[str, str]) -> Compared:
        """Return the given frames of a job that are compared; none if it has no inputs.

        What fails is left out, and `problem` says why: a file that cannot be read, or is not the one that the job was
        sampled with, and latents that the VAE fails to decode.

        Args:
            job: the job.
            inputs: the hash of each of its files, by its path, when it was sampled.
        """
        found = attempt(partial(self._find, job, inputs), None)
        if isinstance(found, Failure):
            return Compared({}, {}, f"given frames were not compared: {found.message}")
        return found

    def _find(self, job: Job, inputs: Mapping[str, str]) -> Compared:
        if not (sources := find_given(job, self._model.backbone.geometry)):
            return NOTHING
        look = job.width, job.height, job.fit, job.background, job.fps, job.num_frames
        key = repr((sources, look, sorted(inputs.items())))
        if key not in self._kept:
            compared = self._read(job, sources)
            for path in {path for source in sources for path in _paths(source)}:
                if sha256_file(path) != inputs.get(str(path)):
                    raise MediaError(f"{path} was changed since the job was sampled")
            self._kept[key] = compared
        self._kept.move_to_end(key)
        while len(self._kept) > MOST_KEPT:
            self._kept.popitem(last=False)
        return self._kept[key]

    def _read(self, job: Job, sources: Sequence[GivenInput]) -> Compared:
        frames, geometry = compared_frames(sources), self._model.backbone.geometry
        pixels: Frames = {}
        round_trip: Frames = {}
        problems = []
        for source in sources:
            if own := [frame for frame in frames if frame in source.origins]:
                if not isinstance(open_input(source.condition, job, geometry), LatentsInput):
                    pixels |= _pixels(source, own, job, geometry)
                decoded = attempt(partial(self._decode, job, source, own), None)
                if isinstance(decoded, Failure):
                    problems.append(f"no round trip of {_paths(source)[0].name}: {decoded.message}")
                else:
                    round_trip |= decoded
        return Compared(pixels, round_trip, "; ".join(problems))

    def _decode(self, job: Job, source: GivenInput, frames: Sequence[int]) -> Frames:
        """Return what the VAE makes of a source's latents, for frames of the video; nothing if that takes too much.

        The latent frames before those that are needed are decoded too, and none after them. A causal VAE gives the same
        as for the whole input; one whose norms see all frames gives what it makes of this part.
        """
        needed = {source.origins[frame] for frame in frames}
        count = self._model.backbone.geometry.latent_frames(max(needed)) + 1
        if count > MOST_DECODED:
            return {}
        z_CFhw = self._encodings.given(source.condition, job, self._hashes)
        decoded: Frames = {}
        start = 0
        for chunk_THWC in self._model.decode_chunks(z_CFhw[:, :count]):
            decoded |= {n: chunk_THWC[n - start].copy() for n in needed if start <= n < start + len(chunk_THWC)}
            start += len(chunk_THWC)
        return {frame: decoded[source.origins[frame]] for frame in frames}


def _paths(source: GivenInput) -> list[Path]:
    return [path for path in (source.condition.source, source.condition.joined) if path is not None]
