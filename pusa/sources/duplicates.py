"""Sources that are another one again: the very bytes, or to look at."""

from collections.abc import Sequence

import numpy as np

# Mean absolute difference of two signatures, of 255, up to which they look alike. Measured: a video of the demo that is
# encoded again, or scaled up, stays within 1.3 of itself; of the demo's 96 different ones, the closest differ by 3.4.
ALIKE = 2.0
PICTURES = 3  # pictures in a signature
NOISE = 1e-3  # of floating point, in means
BLOCKS = 12  # parts of a signature whose means rule out most pairs: the quarters of each picture


def same_as_earlier(names: Sequence[str]) -> dict[int, int]:
    """Place of each that has an equal before it -> place of the first such."""
    first: dict[str, int] = {}
    return {place: earlier for place, name in enumerate(names) if (earlier := first.setdefault(name, place)) != place}


def alike_to_earlier(signatures: np.ndarray) -> dict[int, int]:
    """Of (N, 576) uint8, place of each that looks like an earlier one -> place of the first such original.

    An original looks like none before it. Two look alike whose mean absolute difference is at most `ALIKE`. The
    difference of their means is no greater, nor is the mean difference of their blocks' means: so each is compared
    with its neighbours in the order of means, and in full with those of them alone whose blocks do not rule it out.
    """
    blocks = _block_means(signatures)
    order = np.argsort(blocks.mean(1), kind="stable")
    blocks = blocks[order]
    means = blocks.mean(1)
    lows, highs = np.searchsorted(means, means - ALIKE - NOISE), np.searchsorted(means, means + ALIKE + NOISE)
    is_original = np.zeros(len(order), bool)
    found: dict[int, int] = {}
    for place, row in enumerate(np.argsort(order)):
        near = lows[row] + np.flatnonzero(is_original[lows[row] : highs[row]])
        near = near[np.abs(blocks[near] - blocks[row]).mean(1) <= ALIKE + NOISE]
        originals = order[near]
        originals = originals[_differences(signatures[originals], signatures[place]) <= ALIKE]
        if len(originals):
            found[place] = int(originals.min())
        else:
            is_original[row] = True
    return found


def _block_means(pixels: np.ndarray) -> np.ndarray:
    """(N, 576) -> (N, 12) float32: over the quarters of each picture and its colours."""
    side = int((pixels.shape[1] / PICTURES / 3) ** 0.5)
    parts = pixels.reshape(-1, PICTURES, 2, side // 2, 2, side // 2, 3)
    return parts.mean((3, 5, 6), dtype=np.float32).reshape(-1, BLOCKS)


def _differences(some: np.ndarray, one: np.ndarray) -> np.ndarray:
    return np.abs(some.astype(np.int16) - one).mean(1)
