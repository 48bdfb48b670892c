"""How much a video changes where parts of it meet: given and made, segment and segment, a loop's end and beginning.

Frames are (T, H, W, 3) uint8. A join is named by the frame before it; a loop's last frame is followed by its first.
"""

from collections.abc import Sequence

import numpy as np

from pusa.backbones.geometry import Geometry
from pusa.tasks.base import Job, positions, shown_as


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


def joins(job: Job, geometry: Geometry) -> list[int]:
    """The frames of a job's video after which other latent frames follow than belong with them."""
    last = job.passes(geometry)[-1]
    starts = last.course.starts
    count = len(starts)
    given = {p for c in last.conditions for p in positions(c.place, count, "position")}
    parts = [(frame in given, 0 if _is_staircase(starts) else starts[frame]) for frame in range(count)]
    ends = [frame for frame in range(count - (not job.cyclic)) if parts[frame] != parts[(frame + 1) % count]]
    wrap = {count * geometry.temporal - 1} if job.cyclic else set()
    return sorted({shown_as(frame, count, job, geometry)[-1] for frame in ends} | wrap)


def seams_of(video: np.ndarray, job: Job, geometry: Geometry) -> dict[str, float]:
    """The seam at each join of a job's video, by the frame before it."""
    change, found = changes(video, job.cyclic), joins(job, geometry)
    others = np.delete(change, found)
    usual = max(float(others.mean()) if len(others) else 0.0, 1e-6)
    return {str(frame): round(float(change[frame]) / usual, 3) for frame in found}


def _is_staircase(starts: Sequence[int]) -> bool:
    """Whether no two frames start together, so that there are no segments."""
    return len(set(starts)) == len(starts)
