"""The frames of a clip, by a decoder that has shown itself right."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pusa.decoding import DECODERS
from pusa.decoding.survey import THUMBNAIL, Survey
from pusa.decoding.with_decord import glance
from pusa.errors import Rejected
from pusa.fitting import Placement
from pusa.tables import find

log = logging.getLogger(__name__)
# Levels of 255, the mean over a thumbnail. Seen: 0.15 in 8 bits, 1.8 in 10 bits, which decord rounds otherwise. The
# next frame of a quiet picture is as near as that, so it must not be nearer either, by more than the noise.
TOLERANCE, NOISE = 3.0, 0.25
# Containers in which the same frames, asked for again, are the same. In matroska and avi with B-frames decord was seen
# to give others now and then, and in any container wrong ones in open groups of pictures, such as x265 makes.
SEEKABLE = ("mov",)


def read_clip(
    path: Path, frames: Sequence[int], decoder: str, seconds: float, placement: Placement | None = None
) -> np.ndarray:
    """Exactly these frames.

    Args:
        path: the file.
        frames: indices, as the survey counts; a frame may be shown more than once, and is decoded once.
        decoder: a name of `DECODERS`.
        seconds: time it may take; then the decoder is killed.
        placement: what of a frame is shown, and how large; None leaves frames as they are decoded.

    Returns:
        (T, H, W, 3) uint8.

    Raises:
        Rejected: UNREADABLE, DAMAGED, TIMEOUT, CRASHED.
    """
    distinct = sorted(set(map(int, frames)))
    decoded: np.ndarray = find(DECODERS, decoder, "decoder")(path, distinct, seconds, placement)
    if distinct == list(frames):
        return decoded
    return decoded[np.searchsorted(distinct, frames)]


def choose_decoder(path: Path, survey: Survey, frames: Sequence[int], seconds: float) -> str:
    """Whom to read these frames with: decord, where it sees what ffmpeg saw in the survey, or else ffmpeg."""
    doubt = _doubt(path, survey, sorted(set(map(int, frames))), seconds)
    if doubt is not None:
        log.debug("%s is read with ffmpeg: %s", path, doubt)
    return "decord" if doubt is None else "ffmpeg"


def _doubt(path: Path, survey: Survey, frames: Sequence[int], seconds: float) -> str | None:
    """What speaks against decord."""
    if survey.container not in SEEKABLE:
        return f"decord does not seek well in {survey.container}"
    try:
        facts, thumbnails = glance(path, frames, seconds, THUMBNAIL)
    except Rejected as rejected:
        return f"{rejected.reason}: {rejected.detail}"
    size = (facts["num_frames"], facts["width"], facts["height"])
    if size != (expected := (len(survey.times), survey.width, survey.height)):
        return f"decord takes it for {size} (frames, width, height), ffmpeg for {expected}"
    apart = [difference(thumbnails, survey.thumbnails[_within(frames, step, survey)]) for step in (0, -1, 1)]
    wrong = (apart[0] > TOLERANCE) | (apart[0] > np.minimum(apart[1], apart[2]) + NOISE)
    if not wrong.any():
        return None
    worst = int(np.where(wrong, apart[0], 0).argmax())
    return f"decord's frame {frames[worst]} is {apart[0][worst]:.2f} levels away from ffmpeg's"


def _within(frames: Sequence[int], step: int, survey: Survey) -> np.ndarray:
    """The frames so many further on, of those that there are."""
    return np.clip(np.array(frames) + step, 0, len(survey.times) - 1)


def difference(thumbnails: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(T,): how far thumbnails (T, H, W, 3) are apart, the mean over their pixels, in levels of 255."""
    apart = np.abs(thumbnails.astype(np.float32) - others.astype(np.float32))
    return apart.mean((1, 2, 3))
