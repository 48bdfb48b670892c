"""Cut a source into clips: decide which of its frames and which shape each clip has. No function reads a file."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pusa.errors import Reason, Rejected
from pusa.manifest.models import Bucket, ClipSettings

TIMESTAMP_ROUNDING = 1e-3  # seconds by which a container's time stamps may be off: Matroska has whole milliseconds
FLOAT_NOISE = 1e-6  # seconds of floating-point error
EQUAL_DISTORTION = 0.01  # shapes whose distortions differ by less count as equal, so that other criteria decide
RETIMED_FROM = 0.1  # of a frame interval: a smaller displacement is invisible


@dataclass(frozen=True)
class Timing:
    """The frames of a source on its time line."""

    times: np.ndarray  # (T,) float64 seconds, increasing
    fps: float  # average
    scene_starts: Sequence[int] = ()
    usable: np.ndarray | None = None  # (T,) bool; None: all frames


@dataclass(frozen=True)
class Cut:
    """One clip of a source."""

    frames: np.ndarray  # (F,) int32 indices into the source's frames
    shape: Bucket
    fps: float
    retimed: int  # frames shown more than a tenth of a frame interval away from their time in the source


def cut_source(timing: Timing, width: float, height: float, clip_settings: ClipSettings) -> list[Cut]:
    """Return the clips of a source in the order of time; for `windows: first`, only the first one.

    The source is divided into shots. A shot ends at a scene start, where frames cannot be used, and after a frame that
    is shown for longer than `longest_frame`, because frames across a gap show no motion. In a shot, clips follow one
    another without overlap.

    Args:
        timing: when the source's frames are shown.
        width: of a frame as displayed, in pixels.
        height: of a frame as displayed, in pixels.
        clip_settings: frame rate, shapes and windows of the clips.

    Raises:
        Rejected: TOO_SHORT: no shot is long enough for any shape.
    """
    fps = clip_settings.fps or timing.fps
    times = snap_to_even_grid(timing.times, timing.fps)
    gaps = np.flatnonzero(np.diff(times) > clip_settings.longest_frame + TIMESTAMP_ROUNDING) + 1
    usable = np.ones(len(times), bool) if timing.usable is None else timing.usable
    edges = np.flatnonzero(np.diff(usable)) + 1
    bounds = sorted({0, *timing.scene_starts, *gaps.tolist(), *edges.tolist(), len(times)})
    cuts: list[Cut] = []
    shot_lengths: list[int] = []
    for start, end in itertools.pairwise(bounds):
        if not usable[start]:
            continue
        if clip_settings.fps:
            frames = start + nearest_in_time(times[start:end], clip_settings.fps)
        else:
            frames = np.arange(start, end)
        shot_lengths.append(len(frames))
        shape = choose_shape(clip_settings.shapes, len(frames), width, height)
        if shape is None:
            continue
        for first in range(0, len(frames) - shape.num_frames + 1, shape.num_frames):
            window = frames[first : first + shape.num_frames].astype(np.int32)
            cuts.append(Cut(window, shape, fps, count_retimed(times[window], fps)))
    if not cuts:
        count, shots = len(times), len(shot_lengths)
        shortest = min(shape.num_frames for shape in clip_settings.shapes)
        detail = f"{count} frame{'s' * (count != 1)} at {timing.fps:g} fps give {max(shot_lengths)} at {fps:g} fps"
        if shots > 1:
            detail += f" in the longest of {shots} shots (longest_frame: {clip_settings.longest_frame:g})"
        raise Rejected(Reason.TOO_SHORT, f"{detail}; the shortest shape has {shortest}")
    return cuts[:1] if clip_settings.windows == "first" else cuts


def snap_to_even_grid(times: np.ndarray, fps: float) -> np.ndarray:
    """Return time stamps (T,) that start at 0. Stamps that a container rounded are put back on their even grid.

    The candidates are the average rate, the nearest whole rate and its NTSC variant (24 and 24000/1001, for example).
    """
    times, steps = times - times[0], np.arange(len(times))
    rates = [rate for rate in (fps, round(fps), round(fps * 1.001) / 1.001) if rate > 0]
    grids = [steps / rate for rate in rates]
    best = min(grids, key=lambda grid: np.abs(times - grid).max())
    return best if np.abs(times - best).max() <= TIMESTAMP_ROUNDING + FLOAT_NOISE else times


def nearest_in_time(times: np.ndarray, fps: float) -> np.ndarray:
    """Return the indices (F,) of the frames nearest to the times times[0] + k / fps, up to the last frame's time.

    Of two equally near frames, the earlier one is taken.
    """
    count = int((times[-1] - times[0] + FLOAT_NOISE) * fps) + 1
    due = times[0] + np.arange(count) / fps
    return np.searchsorted((times[:-1] + times[1:]) / 2, due - FLOAT_NOISE)


def count_retimed(times: np.ndarray, fps: float) -> int:
    """Return how many frames of a clip are shown at another time than in the source.

    Args:
        times: (F,) seconds, of the clip's frames in the source. They count from the clip's first frame.
        fps: of the clip. A displacement of up to a tenth of its frame interval is not counted.
    """
    displacement = np.abs(times - times[0] - np.arange(len(times)) / fps)
    return int((displacement > max(RETIMED_FROM / fps, TIMESTAMP_ROUNDING) + FLOAT_NOISE).sum())


def choose_shape(shapes: Sequence[Bucket], num_frames: int, width: float, height: float) -> Bucket | None:
    """Return the shape that distorts a source least among those with at most `num_frames` frames, or None.

    The distortion of a shape w x h for a source of displayed size W x H is |ln((W / H) / (w / h))|: when the source is
    scaled to cover the shape, the share exp(-distortion) of it is kept. Shapes within 0.01 of the least distortion
    count as equal. Among them decide, in this order: the least upscaling max(1, w / W, h / H), the most frames, the
    largest w x h.
    """
    fitting = [shape for shape in shapes if shape.num_frames <= num_frames]
    distortions = [abs(math.log(width / height * shape.height / shape.width)) for shape in fitting]
    limit = min(distortions, default=0.0) + EQUAL_DISTORTION
    candidates = [shape for shape, distortion in zip(fitting, distortions, strict=True) if distortion <= limit]

    def rank(shape: Bucket) -> tuple[float, int, int]:
        upscaling = max(1.0, shape.width / width, shape.height / height)
        return round(upscaling, 6), -shape.num_frames, -shape.width * shape.height

    return min(candidates, key=rank, default=None)
