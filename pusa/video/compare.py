"""Measure how much videos or pictures differ."""

from collections.abc import Sequence

import numpy as np

LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # of BT.601


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of two uint8 arrays in dB; 99 if they are equal."""
    parts = zip(a, b, strict=True) if a.ndim == 4 else [(a, b)]  # frame by frame, which takes less memory
    error = np.mean([np.mean((one.astype(float) - other.astype(float)) ** 2) for one, other in parts])
    return float(min(99.0, 10 * np.log10(255**2 / max(error, 1e-12))))


def ssim(a_THWC: np.ndarray, b_THWC: np.ndarray) -> float:
    """Return the mean structural similarity of the luma of two videos (T, H, W, 3) uint8: about 1 if they are equal.

    Source: Wang et al., "Image quality assessment: from error visibility to structural similarity" (2004), with their
    window of 11 pixels and their constants. Luma is that of BT.601, as in their code.
    """
    import torch
    from torchmetrics.functional.image import structural_similarity_index_measure

    similarities = []
    for pair in zip(a_THWC, b_THWC, strict=True):  # one by one, which takes less memory
        a_11HW, b_11HW = (torch.from_numpy(frame_HWC @ LUMA)[None, None] for frame_HWC in pair)
        similarity = structural_similarity_index_measure(a_11HW, b_11HW, data_range=255.0)
        assert isinstance(similarity, torch.Tensor)  # more is returned on request
        similarities.append(float(similarity))
    return float(np.mean(similarities))


def frame_colours(frames_THWC: np.ndarray) -> np.ndarray:
    """Return the mean colour (T, 3) of each of the frames (T, H, W, 3) uint8, in levels of 255."""
    # Rows first: in one call, numpy would sum the three colours of each pixel by themselves.
    sums = [frame_HWC.sum(0, dtype=np.uint32).sum(0, dtype=np.uint64) for frame_HWC in frames_THWC]
    return np.array(sums).reshape(-1, 3) / max(1, frames_THWC[0].size // 3)


def flicker(lumas_T: Sequence[float] | np.ndarray) -> float:
    """Return how much the mean luma of frames goes back and forth, in the unit of the luma, 0 for a steady fade.

    Where the change d_t = L_(t+1) - L_t has the other sign than the change before it, the smaller of both is what was
    taken back; else 0. Returned is the mean over all t, a measure of our own: a fade, a cut and motion count nothing.

    Args:
        lumas_T: of 3 frames or more.
    """
    changes = np.diff(np.asarray(lumas_T, float))
    before, after = changes[:-1], changes[1:]
    return float(np.where(before * after < 0, np.minimum(abs(before), abs(after)), 0.0).mean())


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
