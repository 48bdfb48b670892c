"""How alike two videos or pictures are."""

from collections.abc import Sequence

import numpy as np


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 arrays; 99 where they are equal."""
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return float(min(99.0, 10 * np.log10(255**2 / max(error, 1e-12))))


def changes(video: np.ndarray, cyclic: bool = False) -> np.ndarray:
    """The mean absolute change from each frame to the next (T - 1,), cyclic (T,), in levels."""
    pairs = list(zip(range(len(video)), range(1, len(video)), strict=False))
    pairs += [(len(video) - 1, 0)] * cyclic
    return np.array([np.abs(video[a].astype(np.int16) - video[b]).mean() for a, b in pairs])


def seam(video: np.ndarray, *frames: int, among: Sequence[int] | None = None, cyclic: bool = False) -> float:
    """The mean change from each of `frames` to the next, in units of that elsewhere: 1 is seamless.

    Elsewhere is between all other neighbours, or from the frames `among`. Negative frames count from the last change.
    """
    change = changes(video, cyclic)
    others = np.delete(change, frames) if among is None else change[list(among)]
    return float(change[list(frames)].mean() / max(others.mean(), 1e-6))
