"""Decode a job's latents to a video piece by piece: put given pixels back, measure the frames, hand them to ffmpeg."""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from pusa.backbones.family import Geometry
from pusa.generate.conditions import open_input, pinned_indices
from pusa.generate.outputs import PREVIEW, PREVIEWS
from pusa.system.files import atomic, sha256_file
from pusa.tasks.base import Job, resolve_positions, video_frames_of
from pusa.video.compare import frame_changes
from pusa.video.formats import beside, hash_output
from pusa.video.media import VideoWriter
from pusa.weights.model import Model

log = logging.getLogger(__name__)
CONSTANT = 2  # levels of 255 by which the pixels of a video may differ that shows nothing
POSTER_SIDE, POSTER_QUALITY = 480, 80  # pixels at most of its longer side; of JPEG, of 100


def write_job_video(
    job: Job, model: Model, z_CFhw: Tensor, path: Path, formats: Sequence[str] = ()
) -> Callable[[], dict[str, Any]]:
    """Decode a job's latents and hand the frames to ffmpeg, which writes them to `path`, as they are made.

    Files of more `formats` are written beside it, and a picture of the middle frame, `path` with the suffix `PREVIEW`.

    Returns:
        A function that waits for ffmpeg, checks the files and returns the facts about them: `seams`, `video_sha256`,
        `hashes` by format, and `warning` if there is one. It may be called in another thread, while the next job is
        decoded. If it raises an error, or is never called, ffmpeg is ended; after an error there is no file.

    Raises:
        ConditionError, MediaError: as `decode_chunks`, and so NotFiniteError and NoMemoryError.
        MediaError: ffmpeg lacks the encoder of a format.
        OSError: ffmpeg ended, or (of the function that is returned) a file is incomplete.
    """
    geometry = model.backbone.geometry
    measures, writer = Measures(job, geometry), VideoWriter(path, job.fps, formats)
    frames = geometry.temporal * z_CFhw.shape[1] if job.cyclic else geometry.num_frames(z_CFhw.shape[1])
    poster_HWC: np.ndarray | None = None
    try:
        for frames_THWC in decode_chunks(job, model, z_CFhw):
            measures.add(frames_THWC)
            if poster_HWC is None and writer.frames + len(frames_THWC) > frames // 2:
                poster_HWC = frames_THWC[frames // 2 - writer.frames].copy()
            writer.write(frames_THWC)
    except BaseException:
        writer.abort()
        raise
    faults = [measures.fault()]
    if tile := model.decoding_tile(z_CFhw):
        faults.append(f"memory sufficed only for tiles of {tile} pixels, whose borders may show")

    def finish() -> dict[str, Any]:
        try:
            writer.finish()
            video_sha256 = sha256_file(path)
            hashes = {"mp4": video_sha256, **{name: hash_output(beside(path, name)) for name in formats}}
            facts = {"seams": measures.seams(), "video_sha256": video_sha256, "hashes": hashes}
        except BaseException:
            writer.abort()
            raise
        if poster_HWC is not None:
            try:
                write_poster(path.with_suffix(PREVIEW), poster_HWC)
            except OSError as error:
                log.warning("job %s has no picture in %s: %s", job.id, PREVIEWS, error)
        return facts | ({"warning": warning} if (warning := "; ".join(filter(None, faults))) else {})

    return finish


def write_poster(path: Path, frame_HWC: np.ndarray) -> None:
    """Write a frame (H, W, 3) uint8 as a small JPEG, atomically; its folder is created.

    Raises:
        OSError: it could not be written.
    """
    picture = Image.fromarray(frame_HWC)
    picture.thumbnail((POSTER_SIDE, POSTER_SIDE), Image.Resampling.LANCZOS)
    with atomic(path) as partial:
        picture.save(partial, "JPEG", quality=POSTER_QUALITY)


def decode_job(job: Job, model: Model, z_CFhw: Tensor) -> np.ndarray:
    """Return all frames (T, H, W, 3) uint8 of `decode_chunks`."""
    return np.concatenate(list(decode_chunks(job, model, z_CFhw)))


def decode_chunks(job: Job, model: Model, z_CFhw: Tensor) -> Iterator[np.ndarray]:
    """Decode a job's latents; yield frames (t, H, W, 3) uint8 as they are made.

    With `exact`, the given pixels are put back where an input has multiplier 0.

    Raises:
        ConditionError: `exact` is set, and an input with multiplier 0 holds latents.
        MediaError: `exact` is set, and such an input cannot be read.
        NotFiniteError: the VAE decodes them to values that are not finite.
        NoMemoryError: they do not fit in memory, not even one latent frame in tiles.
    """
    given = read_given_pixels(job, model.backbone.geometry) if job.exact else {}
    start = 0
    for frames_THWC in model.decode_ring_chunks(z_CFhw) if job.cyclic else model.decode_chunks(z_CFhw):
        end = start + len(frames_THWC)
        if replaced := [frame for frame in range(start, end) if frame in given]:
            frames_THWC = frames_THWC.copy()
            for frame in replaced:
                frames_THWC[frame - start] = given.pop(frame)
        start = end
        yield frames_THWC


def read_given_pixels(job: Job, geometry: Geometry) -> dict[int, np.ndarray]:
    """Return the frames of a job's video that its inputs with multiplier 0 give, (H, W, 3) by their numbers.

    Raises:
        ConditionError: such an input holds latents, which have no pixels.
        MediaError: it cannot be read.
    """
    given: dict[int, np.ndarray] = {}
    run = job.passes(geometry)[-1]
    latent_frames = len(run.timeline.starts)
    for condition in run.conditions:
        if not (pinned := pinned_indices(condition)):
            continue
        source = open_input(condition, job, geometry)
        take = resolve_positions(condition.take, geometry.latent_frames(source.num_frames), "latent frame")
        place = resolve_positions(condition.place, latent_frames, "position")
        origins: dict[int, int] = {}  # frame of the video -> frame of the input
        for i in pinned:
            frames, target = geometry.frames_of(take[i]), video_frames_of(place[i], latent_frames, job, geometry)
            # A picture that fills several frames repeats; of several frames that become one, the last counts.
            repeated = [*frames, *frames[-1:] * (len(target) - len(frames))]
            origins |= zip(target, repeated[-len(target) :], strict=True)
        needed = sorted(set(origins.values()))
        pixels = dict(zip(needed, source.pixels(needed), strict=True))
        given |= {frame: pixels[origin] for frame, origin in origins.items()}
    return given


class Measures:
    """What a job's frames show, measured chunk by chunk."""

    def __init__(self, job: Job, geometry: Geometry) -> None:
        self.cyclic, self.joins = job.cyclic, find_joins(job, geometry)
        self._changes: list[float] = []  # from each frame to the next
        self._edges: list[np.ndarray] = []  # the first frame and the last one so far
        self._lowest, self._highest = np.full(3, 255), np.zeros(3, int)

    def add(self, frames_THWC: np.ndarray) -> None:
        """Measure the next frames (t, H, W, 3) uint8."""
        self._changes.extend(frame_changes([*self._edges[1:], *frames_THWC]))
        first = self._edges[0] if self._edges else frames_THWC[0].copy()
        self._edges = [first, frames_THWC[-1].copy()]
        if (self._highest - self._lowest).max() <= CONSTANT:
            # Columns last: in one call, numpy would reduce the three colours of each pixel by themselves.
            self._lowest = np.minimum(self._lowest, frames_THWC.min((0, 1)).min(0))
            self._highest = np.maximum(self._highest, frames_THWC.max((0, 1)).max(0))

    def seams(self) -> dict[str, float]:
        """Return the seam at each join of the video, by the number of the frame before it.

        A seam is the change from this frame to the next, divided by the mean change between all other neighbours.
        """
        changes = np.array([*self._changes, *(frame_changes(self._edges[::-1]) if self.cyclic else ())])
        others = np.delete(changes, self.joins)
        mean = max(float(others.mean()) if len(others) else 0.0, 1e-6)
        return {str(frame): round(float(changes[frame]) / mean, 3) for frame in self.joins}

    def fault(self) -> str:
        """Return a warning if the video shows nothing, else "": all its pixels have one colour."""
        if (self._highest - self._lowest).max() > CONSTANT:
            return ""
        colour = tuple(int(level) for level in self._lowest)
        return f"the whole video has one colour, {colour}, as if the model had failed"


def find_joins(job: Job, geometry: Geometry) -> list[int]:
    """Return the frames of a job's video after which a part ends.

    Parts are runs of given latent frames, segments (latent frames that start at the same step), and one turn of a loop.
    """
    run = job.passes(geometry)[-1]
    starts = run.timeline.starts
    frames = len(starts)
    staggered = len(set(starts)) == frames  # no two latent frames start together, so there are no segments
    given = {p for c in run.conditions for p in resolve_positions(c.place, frames, "position")}
    parts = [(frame in given, 0 if staggered else start) for frame, start in enumerate(starts)]
    ends = [frame for frame in range(frames - (not job.cyclic)) if parts[frame] != parts[(frame + 1) % frames]]
    wrap = {frames * geometry.temporal - 1} if job.cyclic else set()
    return sorted({video_frames_of(frame, frames, job, geometry)[-1] for frame in ends} | wrap)
