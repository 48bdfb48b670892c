"""The frames of a clip, by the decoder that was chosen for it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pusa.registry import find
from pusa.video.decoders import DECODERS
from pusa.video.fit import Placement


def read_clip(
    path: Path,
    frames: Sequence[int],
    decoder: str,
    seconds: float,
    placement: Placement | None = None,
    start_time: float | None = None,
) -> np.ndarray:
    """Exactly these frames.

    Args:
        path: the file.
        frames: indices, as the survey counts; a frame may be shown more than once, and is decoded once.
        decoder: a name of `DECODERS`.
        seconds: time it may take; then the decoder is killed.
        placement: what of a frame is shown, and how large; None leaves frames as they are decoded.
        start_time: seconds, of the earliest of these frames, as the survey tells it; None where that is not known.

    Returns:
        (T, H, W, 3) uint8.

    Raises:
        Rejected: UNREADABLE, DAMAGED, TIMEOUT, CRASHED.
    """
    distinct = sorted(set(map(int, frames)))
    decoded: np.ndarray = find(DECODERS, decoder, "decoder")(path, distinct, seconds, placement, start_time)
    if distinct == list(frames):
        return decoded
    return decoded[np.searchsorted(distinct, frames)]
