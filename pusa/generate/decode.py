"""Decode a job's latents to a video piece by piece: put given pixels back, measure the frames, hand them to ffmpeg."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from pusa.generate.given import read_pinned
from pusa.generate.numbers import NOTHING, Compared, Measures
from pusa.generate.outputs import PREVIEW, PREVIEWS
from pusa.system.failures import Failure, attempt
from pusa.system.files import atomic, sha256_file
from pusa.tasks.base import Job
from pusa.video.formats import beside, hash_output
from pusa.video.media import VideoWriter
from pusa.video.numbers import measure_file
from pusa.video.provenance import Provenance
from pusa.weights.model import Model

log = logging.getLogger(__name__)
POSTER_SIDE, POSTER_QUALITY = 480, 80  # pixels at most of its longer side; of JPEG, of 100


def write_job_video(
    job: Job,
    model: Model,
    z_CFhw: Tensor,
    path: Path,
    formats: Sequence[str] = (),
    provenance: Provenance | None = None,
    compared: Compared = NOTHING,
) -> Callable[[], dict[str, Any]]:
    """Decode a job's latents and hand the frames to ffmpeg, which writes them to `path`, as they are made.

    The video says what its `provenance` has. Files of more `formats` are written beside it, and a picture of the middle
    frame, `path` with the suffix `PREVIEW`. The given frames that are `compared` become numbers.

    Returns:
        A function that waits for ffmpeg, checks the files and returns the facts about them: `seams` and `colour_steps`
        by frame, `numbers`, `video_sha256`, `hashes` by format, and `warning` if there is one. It may be called in
        another thread, while the next job is decoded. If it raises an error, or is never called, ffmpeg is ended; after
        an error there is no file. Numbers that cannot be measured cost only a warning.

    Raises:
        ConditionError, MediaError: as `decode_chunks`, and so NotFiniteError and NoMemoryError.
        MediaError: ffmpeg lacks the encoder of a format.
        OSError: ffmpeg ended, or (of the function that is returned) a file is incomplete.
    """
    geometry = model.backbone.geometry
    measures, writer = Measures(job, geometry, compared), VideoWriter(path, job.fps, formats, provenance)
    frames = geometry.temporal * z_CFhw.shape[1] if job.cyclic else geometry.num_frames(z_CFhw.shape[1])
    poster_HWC = write_chunks(writer, decode_chunks(job, model, z_CFhw), frames, measures.add)
    faults = [measures.fault(), compared.problem]
    if tile := model.decoding_tile(z_CFhw):
        faults.append(f"memory sufficed only for tiles of {tile} pixels, whose borders may show")

    def finish() -> dict[str, Any]:
        with aborting(writer):
            writer.finish()
            video_sha256 = sha256_file(path)
            hashes = {"mp4": video_sha256, **{name: hash_output(beside(path, name)) for name in formats}}
            numbers: dict[str, Any] = {}
            for measure in (measures.numbers, partial(measure_file, path, writer.frames, job.fps)):
                measured = attempt(measure, None)
                if isinstance(measured, Failure):
                    log.warning("job %s lacks numbers: %s", job.id, measured.message)
                    faults.append(f"numbers are missing: {measured.message}")
                else:
                    numbers |= measured
        facts: dict[str, Any] = {"seams": measures.seams(), "colour_steps": measures.colour_steps()}
        facts |= {"numbers": numbers, "video_sha256": video_sha256, "hashes": hashes}
        if poster_HWC is not None:
            try:
                write_poster(path.with_suffix(PREVIEW), poster_HWC)
            except OSError as error:
                log.warning("job %s has no picture in %s: %s", job.id, PREVIEWS, error)
        return facts | ({"warning": warning} if (warning := "; ".join(filter(None, faults))) else {})

    return finish


def write_chunks(
    writer: VideoWriter,
    chunks: Iterable[np.ndarray],
    frames: int,
    look: Callable[[np.ndarray], None] = lambda frames_THWC: None,
) -> np.ndarray | None:
    """Hand frames to a writer as they are made, and return a copy of the middle one (H, W, 3) for a poster.

    Args:
        writer: is aborted if an error is raised.
        chunks: of frames (t, H, W, 3) uint8.
        frames: how many there are in all.
        look: is called with each chunk before it is written.

    Raises:
        OSError: ffmpeg ended.
    """
    middle_HWC: np.ndarray | None = None
    with aborting(writer):
        for frames_THWC in chunks:
            look(frames_THWC)
            if middle_HWC is None and writer.frames + len(frames_THWC) > frames // 2:
                middle_HWC = frames_THWC[frames // 2 - writer.frames].copy()
            writer.write(frames_THWC)
    return middle_HWC


@contextmanager
def aborting(writer: VideoWriter) -> Iterator[None]:
    """End ffmpeg and remove the files if an error is raised."""
    try:
        yield
    except BaseException:
        writer.abort()
        raise


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
    given = read_pinned(job, model.backbone.geometry) if job.exact else {}
    start = 0
    for frames_THWC in model.decode_ring_chunks(z_CFhw) if job.cyclic else model.decode_chunks(z_CFhw):
        end = start + len(frames_THWC)
        if replaced := [frame for frame in range(start, end) if frame in given]:
            frames_THWC = frames_THWC.copy()
            for frame in replaced:
                frames_THWC[frame - start] = given.pop(frame)
        start = end
        yield frames_THWC
