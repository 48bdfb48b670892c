"""Whom to read a clip with: a decoder that does not begin at the start, where it shows what the survey saw."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pusa.errors import Reason, Rejected
from pusa.system.text import printable
from pusa.video.decoders import with_decord, with_ffmpeg_seek
from pusa.video.survey import THUMBNAIL, Survey

log = logging.getLogger(__name__)
# Levels of 255, the mean over a thumbnail. Seen of decord: 0.15, and 2.2 in 65x49 pixels.
# The survey is ffmpeg's own. The next frame of a quiet picture is as near as that, so it must not be nearer either, by
# more than the noise.
TOLERANCE = {"decord": 3.0, "ffmpeg_seek": 0.0}
NOISE = 0.25
# Containers in which the same frames, asked for again, are the same. In matroska and avi with B-frames decord was seen
# to give others now and then, and in any container wrong ones in open groups of pictures, such as x265 makes.
SEEKABLE = ("mov",)
LONGEST = 10_000  # characters of a line of the log
NEAR = 3.0  # seconds from the start, up to which ffmpeg need not seek


class Choice:
    """The decoder for each clip of one source: decord, ffmpeg that seeks, or ffmpeg from the first frame on.

    What the first two get wrong depends on which frames they are asked for, so they are asked for those of each clip.
    Who takes longer than `seconds` for one, or crashes, is not asked again: no source can make us wait for each clip.
    """

    def __init__(self, path: Path, survey: Survey, seconds: float) -> None:
        self._path, self._survey, self._seconds = path, survey, seconds
        self._given_up: dict[str, str] = {}
        if survey.container not in SEEKABLE:
            self._given_up["decord"] = f"it does not seek well in {survey.container}"
        elif survey.deep:
            self._given_up["decord"] = "it rounds more than 8 bits otherwise"

    def decoder(self, frames: Sequence[int]) -> str:
        """For these frames, as the survey counts."""
        distinct = sorted(set(map(int, frames)))
        for name in TOLERANCE:
            doubt = self._given_up.get(name) or self._doubt(name, distinct)
            if doubt is None:
                return name
            log.debug("%s is not read with %s: %s", printable(self._path), name, printable(doubt))
        return "ffmpeg"

    def _doubt(self, name: str, frames: Sequence[int]) -> str | None:
        """What speaks against a decoder."""
        times = self._survey.times
        if name == "ffmpeg_seek" and times[frames[0]] - times[0] < NEAR:
            return "the frames are near the start"
        try:
            thumbnails = self._glance(name, frames)
        except Rejected as rejected:
            doubt = f"{rejected.reason}: {rejected.detail}"
            if rejected.reason in (Reason.TIMEOUT, Reason.CRASHED):
                self._given_up[name] = doubt
                log.warning("%s is not tried again: %s", name, printable(doubt, LONGEST))
            return doubt
        return _difference(thumbnails, self._survey, frames, TOLERANCE[name])

    def _glance(self, name: str, frames: Sequence[int]) -> np.ndarray:
        """Thumbnails (T, 8, 8, 3) of these frames."""
        if name == "ffmpeg_seek":
            return with_ffmpeg_seek.glance(self._path, frames, self._seconds, float(self._survey.times[frames[0]]))
        facts, thumbnails = with_decord.glance(self._path, frames, self._seconds, THUMBNAIL)
        size = (facts["num_frames"], facts["width"], facts["height"])
        if size != (expected := (len(self._survey.times), self._survey.width, self._survey.height)):
            told = f"decord takes it for {size} (frames, width, height), ffmpeg for {expected}"
            raise Rejected(Reason.DAMAGED, told)
        return thumbnails


def _difference(thumbnails: np.ndarray, survey: Survey, frames: Sequence[int], tolerance: float) -> str | None:
    """The worst of the thumbnails that are not the survey's of these frames, or are those of a neighbour."""
    apart = [difference(thumbnails, survey.thumbnails[_within(frames, step, survey)]) for step in (0, -1, 1)]
    wrong = (apart[0] > tolerance) | (apart[0] > np.minimum(apart[1], apart[2]) + NOISE)
    if not wrong.any():
        return None
    worst = int(np.where(wrong, apart[0], 0).argmax())
    return f"its frame {frames[worst]} is {apart[0][worst]:.2f} levels away from the survey's"


def _within(frames: Sequence[int], step: int, survey: Survey) -> np.ndarray:
    """The frames so many further on, of those that there are."""
    return np.clip(np.array(frames) + step, 0, len(survey.times) - 1)


def difference(thumbnails: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(T,): how far thumbnails (T, H, W, 3) are apart, the mean over their pixels, in levels of 255."""
    apart = np.abs(thumbnails.astype(np.float32) - others.astype(np.float32))
    return apart.mean((1, 2, 3))
