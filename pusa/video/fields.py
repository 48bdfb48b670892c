"""Decide from the flags and the pictures of a video whether its frames are woven of two fields, and of which kind."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

# Shares of the frames whose kind ffmpeg's idet could tell.
CLEAR_SHARE = 0.6  # in one field order, above which the pictures look interlaced
OTHER_SHARE = 0.1  # in the other order, above which idet is misled: fine lines that move look like both
KNOWN_SHARE = 0.2  # of all frames, whose kind must be known to contradict the flags
# In a whole frame, moving parts show less comb than this share of the comb that fields of two frames show together.
# Measured: at most 0.31 for moving patterns of whole frames, at least 0.5 for fields of two times.
WHOLE_FRAME_COMB = 0.42
PAIRS = 12  # of frames that are compared
MOVES_FROM = 10  # levels of 255
MOVING_SHARE = 5e-4  # of the pixels, that a pair needs
# Film at 24 frames a second that became 60 fields has each fifth frame twice, once its fields are matched: there the
# change is less than this share of the median. Measured on drawn film: at most 0.42; on fields of 60 times, at least
# 0.56.
REPEATED_CHANGE = 0.5
CYCLE = 5  # frames
STRETCH = 10  # cycles in which the repeated frame has one place; cuts that were made later move it
MIN_CYCLES = 3  # with motion, that a stretch needs
MIN_CHANGE = 0.05  # levels of 255, the median of a cycle with motion


@dataclass
class FieldCounts:
    """How many frames idet finds to be of each kind, judged frame by frame."""

    kinds: Counter[str] = field(default_factory=Counter)  # tff, bff, progressive, undetermined

    @property
    def order(self) -> str:
        """Return "top_first" or "bottom_first" if the pictures look interlaced, else "progressive"."""
        top, bottom, progressive = (self.kinds[kind] for kind in ("tff", "bff", "progressive"))
        known, more, less = top + bottom + progressive, max(top, bottom), min(top, bottom)
        is_clear = more >= CLEAR_SHARE * known and less <= OTHER_SHARE * known
        if known < KNOWN_SHARE * self.kinds.total() or not known or not is_clear:
            return "progressive"
        return "top_first" if top > bottom else "bottom_first"


def pairs_to_compare(num_frames: int) -> list[int]:
    """Return the frames t, spread over a video, that are to be compared with the frame t + 1."""
    return sorted(set(np.linspace(0, num_frames - 2, PAIRS).astype(int).tolist())) if num_frames > 1 else []


def are_whole_frames(pairs: np.ndarray) -> bool:
    """Return whether frames that may be woven of two fields were taken at one time each.

    Args:
        pairs: (N, 2, H, W) uint8, grey levels of N pairs of neighbouring frames.

    Returns:
        whether at least three quarters of the pairs with motion show whole frames; False if nothing moves.
    """
    shares = []
    for now, then in pairs:
        moving = np.abs(now.astype(np.int16) - then) > MOVES_FROM
        if moving.mean() < MOVING_SHARE:
            continue
        mixed = []
        for first in (0, 1):
            woven = now.copy()
            woven[first::2] = then[first::2]
            mixed.append(_comb(woven, moving))
        shares.append(_comb(now, moving) / max(min(mixed), 1))
    return len(shares) > 0 and bool(np.quantile(shares, 0.75) < WHOLE_FRAME_COMB)


def _comb(frame: np.ndarray, moving: np.ndarray) -> int:
    """Return the sum over moving pixels by which a row differs from both its neighbours in the same direction."""
    rows = frame.astype(np.int16)
    above, below = rows[1:-1] - rows[:-2], rows[1:-1] - rows[2:]
    comb = np.where((above > 0) == (below > 0), np.minimum(np.abs(above), np.abs(below)), 0)
    return int(comb[moving[1:-1]].sum())


def is_film(thumbnails: np.ndarray) -> bool:
    """Return whether fields come from film, by frames whose fields were matched with ffmpeg's fieldmatch.

    Args:
        thumbnails: (T, 8, 8, 3), of all frames.
    """
    change = np.abs(np.diff(thumbnails.astype(np.int16), axis=0)).mean((1, 2, 3))
    cycles = change[: len(change) // CYCLE * CYCLE].reshape(-1, CYCLE)
    median = np.median(cycles, axis=1, keepdims=True)
    found = []
    for start in range(0, len(cycles), STRETCH):
        moving = median[start : start + STRETCH, 0] > MIN_CHANGE
        if moving.sum() >= MIN_CYCLES:
            relative = (cycles[start : start + STRETCH] / np.maximum(median[start : start + STRETCH], MIN_CHANGE))[
                moving
            ]
            found.append(np.median(relative, axis=0).min() < REPEATED_CHANGE)
    return len(found) > 0 and bool(np.mean(found) > 0.5)
