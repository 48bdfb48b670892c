"""How a source becomes clips: which of its frames, in which shape. Nothing here reads a file."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pusa.errors import Reason, Rejected
from pusa.manifest.models import Bucket, ClipRule

ROUNDING = 1e-3  # seconds by which a container's time stamps may be off: Matroska's are whole milliseconds
NOISE = 1e-6  # seconds, of floating point
ALIKE = 0.01  # of two shapes that cut away nearly the same share, the other virtues decide
DISPLACED = 0.1  # of a frame's time


@dataclass(frozen=True)
class Timing:
    """The frames of a source on its time line."""

    times: np.ndarray  # (T,) float64 seconds, rising
    fps: float  # on average
    scene_starts: Sequence[int] = ()


@dataclass(frozen=True)
class Clip:
    """One clip of a source."""

    frames: np.ndarray  # (F,) int32 indices into the source's frames
    shape: Bucket
    fps: float
    retimed: int  # frames that are shown more than a tenth of a frame away from their time in the source


def cut(timing: Timing, width: float, height: float, rule: ClipRule) -> list[Clip]:
    """The clips of a source, stretch by stretch; where the rule's windows are "first", the first one.

    A stretch ends at a cut, and at a frame that is shown for too long: what follows a gap is no motion.

    Args:
        timing: when its frames are shown.
        width: of a frame as it is displayed, pixels.
        height: as width.
        rule: what is wanted.

    Raises:
        Rejected: it is too short for any shape.
    """
    fps = rule.fps or timing.fps
    times = even(timing.times, timing.fps)
    gaps = np.flatnonzero(np.diff(times) > rule.longest_frame + ROUNDING) + 1
    bounds = sorted({0, *timing.scene_starts, *gaps.tolist(), len(times)})
    clips: list[Clip] = []
    lengths = []
    for start, end in itertools.pairwise(bounds):
        frames = start + (nearest(times[start:end], rule.fps) if rule.fps else np.arange(end - start))
        lengths.append(len(frames))
        shape = choose_shape(rule.shapes, len(frames), width, height)
        if shape is not None:
            clips += [
                Clip(w.astype(np.int32), shape, fps, count_retimed(times[w], fps)) for w in _windows(frames, shape)
            ]
    if not clips:
        raise Rejected(Reason.TOO_SHORT, _too_short(len(times), timing.fps, max(lengths), len(lengths), rule, fps))
    return clips[:1] if rule.windows == "first" else clips


def even(times: np.ndarray, fps: float) -> np.ndarray:
    """Time stamps (T,) from 0 on; such as a container rounded, put back on the even grid that they came from."""
    times, steps = times - times[0], np.arange(len(times))
    rates = [rate for rate in (fps, round(fps), round(fps * 1.001) / 1.001) if rate > 0]  # 24, and 24000/1001
    grids = [steps / rate for rate in rates]
    best = min(grids, key=lambda grid: np.abs(times - grid).max())
    return best if np.abs(times - best).max() <= ROUNDING + NOISE else times


def nearest(times: np.ndarray, fps: float) -> np.ndarray:
    """Indices (F,) of the frames nearest in time to times[0] + k / fps, of two the earlier, up to the last frame's."""
    count = int((times[-1] - times[0] + NOISE) * fps) + 1
    due = times[0] + np.arange(count) / fps
    return np.searchsorted((times[:-1] + times[1:]) / 2, due - NOISE)


def count_retimed(times: np.ndarray, fps: float) -> int:
    """Of a clip's frames, which have these times (F,) in the source, how many are shown at another than their own.

    Times count from the clip's first frame. A tenth of the clip's frame interval is nothing that anyone could see.
    """
    away = np.abs(times - times[0] - np.arange(len(times)) / fps)
    return int((away > max(DISPLACED / fps, ROUNDING) + NOISE).sum())


def choose_shape(shapes: Sequence[Bucket], num_frames: int, width: float, height: float) -> Bucket | None:
    """Of the shapes that so many frames are enough for, the one that distorts a source least; None if there is none.

    The distortion of a shape w x h for a source of displayed size W x H is |ln((W / H) / (w / h))|: of what is scaled
    to cover the shape, the share exp(-distortion) is kept. Shapes within 0.01 of the least count as equal; among them
    decide, in this order: the least upscaling max(1, w / W, h / H), the most frames, the largest w x h.
    """
    fitting = [shape for shape in shapes if shape.num_frames <= num_frames]
    distortions = [abs(math.log(width / height * shape.height / shape.width)) for shape in fitting]
    least = min(distortions, default=0.0) + ALIKE
    alike = [shape for shape, distortion in zip(fitting, distortions, strict=True) if distortion <= least]
    return min(alike, key=lambda shape: _rank(shape, width, height), default=None)


def _rank(shape: Bucket, width: float, height: float) -> tuple[float, int, int]:
    upscaling = max(1.0, shape.width / width, shape.height / height)
    return round(upscaling, 6), -shape.num_frames, -shape.width * shape.height


def _windows(frames: np.ndarray, shape: Bucket) -> list[np.ndarray]:
    """All that fit, one after another."""
    length = shape.num_frames
    return [frames[start : start + length] for start in range(0, len(frames) - length + 1, length)]


def _too_short(count: int, fps: float, longest: int, scenes: int, rule: ClipRule, clip_fps: float) -> str:
    shortest = min(shape.num_frames for shape in rule.shapes)
    stretch = f" in the longest of {scenes} stretches (longest_frame: {rule.longest_frame:g})" if scenes > 1 else ""
    made = f"{count} frame{'s' * (count != 1)} at {fps:g} a second make {longest} at {clip_fps:g}{stretch}"
    return f"{made}; the shortest shape has {shortest}"
