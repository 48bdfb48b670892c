"""Choose a decoder for a clip: one that does not start at the first frame, if it shows what the survey saw."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from pusa.errors import Reason, Rejected
from pusa.system.text import printable
from pusa.video.conversion import NONE, THUMBNAIL_SIDE
from pusa.video.decoders import with_decord, with_ffmpeg
from pusa.video.header import UNSPECIFIED
from pusa.video.survey import Survey

log = logging.getLogger(__name__)
# The largest accepted difference to the survey's thumbnail, the mean over a thumbnail in levels of 255. Measured with
# decord: 0.15, and 2.2 for 65x49 pixels. ffmpeg must match exactly, because it makes the survey. In a quiet video the
# next frame may differ by less, so a thumbnail must also not match a neighbouring frame better, by more than NOISE.
TOLERANCE = {"decord": 3.0, "ffmpeg_seek": 0.0, "ffmpeg": 0.0}
NOISE = 0.25
# Containers in which decord always returns the same frames for the same request. In matroska and avi with B-frames it
# sometimes returned others; in any container it returned wrong ones for open groups of pictures, as x265 makes them.
RELIABLE_CONTAINERS = ("mov",)
MAX_LOG_CHARACTERS = 10_000
NEAR_START = 3.0  # seconds: up to there, decoding from the start is fast enough
ThumbnailReader = Callable[[Path, Sequence[int], float, Survey], np.ndarray]


def _decord_thumbnails(path: Path, frames: Sequence[int], seconds: float, survey: Survey) -> np.ndarray:
    size, thumbnails = with_decord.read_thumbnails(path, frames, seconds, THUMBNAIL_SIDE)
    if size != (expected := (len(survey.times), survey.width, survey.height)):
        raise Rejected(Reason.DAMAGED, f"decord sees {size} (frames, width, height), ffmpeg {expected}")
    return thumbnails


def _seeking_thumbnails(path: Path, frames: Sequence[int], seconds: float, survey: Survey) -> np.ndarray:
    start_time = float(survey.times[frames[0]])
    return with_ffmpeg.read_thumbnails(path, frames, seconds, survey.conversion, start_time)


def _thumbnails_from_start(path: Path, frames: Sequence[int], seconds: float, survey: Survey) -> np.ndarray:
    return with_ffmpeg.read_thumbnails(path, frames, seconds, survey.conversion)


THUMBNAIL_READERS: dict[str, ThumbnailReader] = {"decord": _decord_thumbnails, "ffmpeg_seek": _seeking_thumbnails}


def find_objection_to_decord(survey: Survey) -> str | None:
    """Return why decord would not return the frames that ffmpeg returns, or None.

    decord converts by the matrix and range that the file states, and takes BT.601 where it states no matrix.
    """
    header, conversion = survey.header, survey.conversion
    stated = "smpte170m" if header.matrix == UNSPECIFIED else header.matrix
    as_stated = header.colour_model != "yuv" or conversion.matrix == stated
    objections = {
        f"it does not seek reliably in {header.container}": header.container not in RELIABLE_CONTAINERS,
        "it rounds colours of more than 8 bits differently": header.bit_depth > 8,
        "it may read another of the video streams": header.video_streams > 1,
        "it drops alpha": conversion.has_alpha,
        "only the container states the colours": header.only_container_states_colours,
        f"it does not read colours as {conversion.matrix}": conversion.changes_colours or not as_stated,
        "it does not deinterlace": conversion.deinterlace != NONE,
        "the file is damaged": bool(survey.damage),
    }
    return next((text for text, holds in objections.items() if holds), None)


class DecoderChooser:
    """Chooses the decoder for each clip of one source: decord, ffmpeg that seeks, or ffmpeg from the first frame on.

    Which frames the first two get wrong depends on which frames they are asked for. So they are tried with the frames
    of each clip. One that exceeds its time limit or crashes is not tried again, so that no source makes us wait for
    every clip.
    """

    def __init__(
        self, path: Path, survey: Survey, seconds: float, readers: Mapping[str, ThumbnailReader] = THUMBNAIL_READERS
    ) -> None:
        """Prepare to choose.

        Args:
            path: the source.
            survey: of the source.
            seconds: time limit of a decoder for one clip.
            readers: the decoders to try, in this order. Each reads thumbnails of frames.
        """
        self._path, self._survey, self._seconds, self._readers = path, survey, seconds, readers
        self._given_up: dict[str, str] = {}  # decoder -> the reason
        if objection := find_objection_to_decord(survey):
            self._given_up["decord"] = objection
        if not survey.conversion.keeps_frames:
            self._given_up["ffmpeg_seek"] = "which frames of film are repeated is counted from the first one on"
        if survey.damage:  # what a decoder makes of damage may depend on where it starts, or on chance
            self._readers = {"ffmpeg": _thumbnails_from_start}

    def choose(self, frames: Sequence[int]) -> str:
        """Return the name of the decoder for these frames, whose indices are the survey's.

        Raises:
            Rejected: the source is damaged, and these frames are not the same when they are decoded again (DAMAGED), or
                cannot be (TIMEOUT, CRASHED).
        """
        distinct = sorted(set(map(int, frames)))
        for name in self._readers:
            objection = self._given_up.get(name) or self._try(name, distinct)
            if objection is None:
                return name
            log.debug("%s is not read with %s: %s", printable(self._path), name, printable(objection))
        if self._survey.damage:
            raise Rejected(Reason.DAMAGED, f"{self._path} is damaged: {self._survey.damage}; and {objection}")
        return "ffmpeg"

    def _try(self, name: str, frames: Sequence[int]) -> str | None:
        """Return why a decoder cannot be used for these frames, or None."""
        survey = self._survey
        if name == "ffmpeg_seek" and survey.times[frames[0]] - survey.times[0] < NEAR_START:
            return "the frames are near the start"
        try:
            thumbnails = self._readers[name](self._path, frames, self._seconds, survey)
        except Rejected as rejected:
            objection = f"{rejected.reason}: {rejected.detail}"
            if rejected.reason in (Reason.TIMEOUT, Reason.CRASHED):
                if survey.damage:  # no other decoder can be used, and another try may succeed
                    raise
                self._given_up[name] = objection
                log.warning("%s is not tried again: %s", name, printable(objection, MAX_LOG_CHARACTERS))
            return objection
        # Each thumbnail must match the survey's of its own frame, and better than those of the frames before and after.
        own, before, after = (
            thumbnail_differences(
                thumbnails, survey.thumbnails[np.clip(np.array(frames) + step, 0, len(survey.times) - 1)]
            )
            for step in (0, -1, 1)
        )
        wrong = (own > TOLERANCE[name]) | (own > np.minimum(before, after) + NOISE)
        if not wrong.any():
            return None
        worst = int(np.where(wrong, own, 0).argmax())
        return f"its frame {frames[worst]} differs from the survey's by {own[worst]:.2f} levels"


def thumbnail_differences(thumbnails: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the mean absolute differences (T,) of thumbnails (T, H, W, 3), in levels of 255."""
    return np.abs(thumbnails.astype(np.float32) - others.astype(np.float32)).mean((1, 2, 3))
