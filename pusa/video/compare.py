"""Measure how much videos or pictures differ."""

from collections.abc import Sequence

import numpy as np


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of two uint8 arrays in dB; 99 if they are equal."""
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return float(min(99.0, 10 * np.log10(255**2 / max(error, 1e-12))))


def frame_changes(video: np.ndarray | Sequence[np.ndarray], cyclic: bool = False) -> np.ndarray:
    """Return the mean absolute change from each frame to the next, in levels of 255.

    Args:
        video: (T, H, W, 3) uint8.
        cyclic: include the change from the last frame to the first.

    Returns:
        (T - 1,); if cyclic, (T,).
    """
    pairs = list(zip(range(len(video)), range(1, len(video)), strict=False))
    pairs += [(len(video) - 1, 0)] * cyclic
    return np.array([(np.maximum(video[a], video[b]) - np.minimum(video[a], video[b])).mean() for a, b in pairs])


def seam(video: np.ndarray, *frames: int, among: Sequence[int] | None = None, cyclic: bool = False) -> float:
    """Return the mean change from each of `frames` to the next, divided by the mean change elsewhere: 1 is seamless.

    Args:
        video: (T, H, W, 3) uint8.
        frames: indices; negative ones count from the last change.
        among: frames from which the changes elsewhere are taken; by default, all other frames.
        cyclic: the frame after the last is the first.
    """
    change = frame_changes(video, cyclic)
    others = np.delete(change, frames) if among is None else change[list(among)]
    return float(change[list(frames)].mean() / max(others.mean(), 1e-6))
