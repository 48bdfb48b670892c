"""Read many videos of a run at once: for their strips, and for the numbers that an earlier version did not record."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pusa.system.failures import Failure, attempt
from pusa.system.progress import Progress
from pusa.system.threads import run_in_threads
from pusa.video.compare import LUMA, flicker, frame_changes, frame_colours
from pusa.video.media import VideoFacts, probe, read_frames
from pusa.video.numbers import measure_file

READERS = 4  # that work at once: most of their time is spent on starting
BYTES_AT_ONCE = 1 << 28  # of the frames of a video
PATIENCE = 3600.0  # seconds
Result = TypeVar("Result")


def read_videos(work: Callable[[Path], Result], videos: Sequence[Path], label: str) -> dict[Path, Result | Failure]:
    """Return what `work` makes of each video, or why it cannot, and show the progress under a label."""

    def one(video: Path) -> tuple[Path, Result | Failure]:
        return video, attempt(partial(work, video), None)

    made = {}
    with Progress(label, len(videos)) as progress:
        for outcome in run_in_threads(one, videos, READERS, PATIENCE):
            if outcome is not None:
                made[outcome[0]] = outcome[1]
                progress.advance()
    return made


def measure_video(video: Path) -> dict[str, Any]:
    """Return the numbers of a record that a video alone gives, measured on the pixels that its file holds.

    Those of `measure_file`, `motion`, and `flicker` for 3 frames or more. They differ a little from those of a record,
    which `pusa generate` measures before the video is compressed.

    Raises:
        MediaError: the video cannot be read.
    """
    facts = probe(video)
    changes: list[float] = []
    lumas: list[float] = []
    last: list[np.ndarray] = []
    for frames_THWC in _chunks(video, facts):
        changes.extend(frame_changes([*last, *frames_THWC]))
        lumas.extend(frame_colours(frames_THWC) @ LUMA)
        last = [frames_THWC[-1]]
    numbers = {"motion": float(np.mean(changes))} if changes else {}
    numbers |= {"flicker": flicker(lumas)} if len(lumas) > 2 else {}
    return {**numbers, **measure_file(video, facts.num_frames, facts.fps)}


def _chunks(video: Path, facts: VideoFacts) -> Iterator[np.ndarray]:
    """Yield all frames of a video, as many at once as `BYTES_AT_ONCE` allow."""
    at_once = max(1, math.floor(BYTES_AT_ONCE / (facts.width * facts.height * 3)))
    for first in range(0, facts.num_frames, at_once):
        yield read_frames(video, range(first, min(first + at_once, facts.num_frames)))
