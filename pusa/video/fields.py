"""Decide from the flags and the pictures of a video whether its frames are woven of two fields, and of which kind."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

# idet judges each frame by the frames around it. Its sums run over whole frames, so a small object that moves before a
# detailed background changes them by little: it reports from 2% on, and the pairs below are looked at where it moves.
IDET = "idet=intl_thres=1.02:rep_thres=1.2"
ORDERS = {"tff": "top_first", "bff": "bottom_first"}
SUSPECTED_SHARE = 0.05  # of all frames in one field order, from which frames are looked at more closely
OTHER_SHARE = 0.2  # in the other order, above which idet is misled: fine lines that move look like both
CLEAR_SHARE = 0.6  # of the frames whose kind idet could tell, enough where nothing moves far enough to be looked at
KNOWN_SHARE = 0.3  # of all frames, that idet must know then; a small clock on a still page has up to 0.25
WHOLE_SHARE = 0.9  # of the known ones: only whole frames
# Lines of a picture that may be fields although the file does not say so; each pattern is fine in smaller ones
MIN_LINES = 72

PAIRS = 12  # of neighbouring frames that are compared
PAIR_BYTES = 2**28  # of decoded frames, for large pictures
MOVES_FROM = 10  # levels of 255
MOVING_SHARE, MOVING_PIXELS = 1e-4, 32  # that a pair needs
# A frame is compared with two frames that are woven of it and the next one. Fields of two times show as much comb in
# one of them as in the frame itself, and more in the other; whole frames show the same comb in both, and less in the
# frame itself. Measured, share = own comb / smaller of both: whole frames at most 0.31 (three quarters of those of
# a pattern; 0.34 in poor quality), with fine detail 0.84; fields from 0.5 on, 0.27 where an encoder smoothed them.
# rise = (smaller - own) / (larger - own): whole frames with fine detail from 0.78 on, fields at most 0.73.
LITTLE_COMB, LEAST_COMB = 0.42, 0.34  # the latter if flags and idet both say fields
SAME_COMB, MUCH_RISE = 0.9, 0.75  # of a whole frame, if idet finds no fields
MOST_COMB = 320  # levels, that the larger of both needs
NOISY = 1.15  # larger / smaller below which a frame with as much comb as both shows noise, or motion that is too fast
WHOLE_PAIRS = 0.75  # of all pairs that tell

CYCLE = 5  # frames of 30 a second that hold 4 frames of film: two of the five repeat a field of the frame before
STRETCH = 5  # cycles in which the repeated fields have one place; cuts that were made later move it
WOVEN_SHARE = 0.95  # of all frames in one field order, above which it is not film: there each fifth is whole
MIN_CYCLES = 3  # with motion, that a stretch needs
# From the repeated top field to the repeated bottom one: for two and three fields of a frame in turn, or 2, 3, 3, 2.
FILM_STEPS = {"top_first": (2, 1), "bottom_first": (3, 4)}
FILM_SHARE = 0.6  # of these cycles, that repeat both fields


@dataclass
class FieldMarks:
    """What idet finds in each frame: its kind, and which field repeats that of the frame before."""

    kinds: list[str] = field(default_factory=list)  # tff, bff, progressive, undetermined
    repeats: list[str] = field(default_factory=list)  # neither, top, bottom

    _KIND: ClassVar[str] = "lavfi.idet.single.current_frame="
    _REPEAT: ClassVar[str] = "lavfi.idet.repeated.current_frame="

    def read(self, line: str) -> None:
        """Take a line of ffmpeg's metadata, if it is idet's."""
        if line.startswith(self._KIND):
            self.kinds.append(line.removeprefix(self._KIND))
        elif line.startswith(self._REPEAT):
            self.repeats.append(line.removeprefix(self._REPEAT))

    @property
    def suspected(self) -> str:
        """Return the field order that a part of the frames seems to have, or "progressive"."""
        (kind, more), (_, less) = sorted(((kind, self.kinds.count(kind)) for kind in ORDERS), key=lambda item: -item[1])
        is_enough = more >= max(2, SUSPECTED_SHARE * len(self.kinds))
        return ORDERS[kind] if is_enough and less <= OTHER_SHARE * more else "progressive"

    @property
    def clear(self) -> str:
        """Return the field order that nearly all frames have, "progressive", or "" if idet cannot tell."""
        counts = Counter(self.kinds)
        known = counts.total() - counts["undetermined"]
        if not known or known < KNOWN_SHARE * counts.total():
            return ""
        if counts["progressive"] >= WHOLE_SHARE * known:
            return "progressive"
        is_clear = max(counts[kind] for kind in ORDERS) >= CLEAR_SHARE * known
        return self.suspected if is_clear and self.suspected != "progressive" else ""

    def pairs(self, flagged: str, pixels: int) -> list[int]:
        """Return the frames t that are to be compared with t + 1, so that no more than `PAIR_BYTES` are decoded.

        These are the suspected ones. A video that is flagged as interlaced and has none is sampled throughout.

        Args:
            flagged: the field order that the file states.
            pixels: of a frame.
        """
        last = len(self.kinds) - 1
        if self.suspected != "progressive":
            among = [number for number, kind in enumerate(self.kinds[:last]) if ORDERS.get(kind) == self.suspected]
        else:
            among = list(range(last)) if flagged != "progressive" else []
        count = min(PAIRS, max(3, PAIR_BYTES // (pixels * 6)), len(among))
        if not count:
            return []
        # The step is odd to the cycle of film, so that not all pairs are at the same place of it.
        places = {min(int(place) + number % CYCLE, len(among) - 1) for number, place in enumerate(
            np.linspace(0, len(among) - 1, count))}  # fmt: skip
        return [among[place] for place in sorted(places)]

    def film_order(self) -> str:
        """Return the field order of film at 24 frames a second that became 60 fields, or "progressive" for others.

        There each five frames repeat one top and one bottom field, at places that only a cut changes.
        """
        if max(self.kinds.count(kind) for kind in ORDERS) > WOVEN_SHARE * len(self.kinds):
            return "progressive"
        length = min(len(self.kinds), len(self.repeats)) // CYCLE * CYCLE
        repeats = np.array(self.repeats[:length]).reshape(-1, CYCLE)
        woven = np.isin(self.kinds[:length], list(ORDERS)).reshape(-1, CYCLE)
        moving = (repeats != "neither").any(1) | (woven.sum(1) > CYCLE // 2)
        votes: Counter[str] = Counter()
        for start in range(0, len(repeats), STRETCH):
            part, moves = repeats[start : start + STRETCH], int(moving[start : start + STRETCH].sum())
            if moves < MIN_CYCLES:
                continue
            found = {order: max(_most_cycles(part, step) for step in steps) for order, steps in FILM_STEPS.items()}
            order = max(found, key=lambda name: found[name])
            votes[order if found[order] >= FILM_SHARE * moves else "progressive"] += 1
        order = max(("progressive", *ORDERS.values()), key=lambda name: votes[name])
        return order if votes["progressive"] < votes["top_first"] + votes["bottom_first"] else "progressive"


def _most_cycles(repeats: np.ndarray, apart: int) -> int:
    """Return in how many cycles (N, 5) a top field is repeated at one place and a bottom field `apart` frames later."""
    return max(
        int(((repeats[:, place] == "top") & (repeats[:, (place + apart) % CYCLE] == "bottom")).sum())
        for place in range(CYCLE)
    )


def judge_pairs(pairs: np.ndarray, flagged: bool, suspected: bool) -> str:
    """Return what pairs of neighbouring frames show where they move.

    Args:
        pairs: (N, 2, H, W) uint8, grey levels.
        flagged: whether the file states that they are fields.
        suspected: whether idet finds fields in them.

    Returns:
        "progressive" if at least three quarters of the pairs show whole frames, else the field order of most others;
        "" if no pair tells.
    """
    little = LEAST_COMB if flagged and suspected else LITTLE_COMB
    votes = Counter(_votes(pairs, little, np.inf if suspected else MUCH_RISE))
    if not votes:
        return ""
    if votes["progressive"] >= WHOLE_PAIRS * votes.total():
        return "progressive"
    return max(ORDERS.values(), key=lambda order: votes[order])


def _votes(pairs: np.ndarray, little: float, much: float) -> Iterator[str]:
    for now, then in pairs:
        moving = np.abs(now.astype(np.int16) - then) > MOVES_FROM
        if moving.sum() < max(MOVING_PIXELS, MOVING_SHARE * moving.size):
            continue
        mixed = []
        for first in (0, 1):
            woven = now.copy()
            woven[first::2] = then[first::2]
            mixed.append(_comb(woven, moving))
        own, smaller, larger = _comb(now, moving), max(min(mixed), 1), max(*mixed, 1)
        share, rise = own / smaller, (smaller - own) / max(larger - own, 1)
        if larger < MOST_COMB or (larger < NOISY * smaller and share > 1 / NOISY):
            continue
        if share < little or (share < SAME_COMB and rise > much):
            yield "progressive"
        else:
            yield "top_first" if mixed[0] < mixed[1] else "bottom_first"


def _comb(frame: np.ndarray, moving: np.ndarray) -> int:
    """Return the sum over moving pixels by which a row differs from both its neighbours in the same direction."""
    rows = frame.astype(np.int16)
    above, below = rows[1:-1] - rows[:-2], rows[1:-1] - rows[2:]
    comb = np.where((above > 0) == (below > 0), np.minimum(np.abs(above), np.abs(below)), 0)
    return int(comb[moving[1:-1]].sum())
