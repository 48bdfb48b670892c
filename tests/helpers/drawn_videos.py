"""Videos that are drawn in a moment, and whose numbers are known."""

import numpy as np


def moving(frames: int = 30, height: int = 64, width: int = 64) -> np.ndarray:
    """Return (T, H, W, 3) uint8: a pattern of blocks, none of them black, that turns by two pixels a frame."""
    blocks = np.random.default_rng(0).integers(60, 200, (height // 8, width // 8, 3), np.uint8)
    pattern = np.kron(blocks, np.ones((8, 8, 1), np.uint8))
    return np.stack([np.roll(pattern, 2 * i, 1) for i in range(frames)])


def fading(*levels: float) -> np.ndarray:
    """Return (T, 16, 16, 3) uint8: frames of one grey each."""
    return np.array(levels, np.uint8)[:, None, None, None] * np.ones((1, 16, 16, 3), np.uint8)
