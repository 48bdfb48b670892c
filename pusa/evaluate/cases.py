"""What the quality report has made: for each case a job for an unseen clip, and the metrics read off the video."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pusa.evaluate import metrics
from pusa.evaluate.metrics import FOLLOWED, GEOMETRY, PROMPTED, Metric
from pusa.evaluate.unseen import SETTINGS, Returned, Unseen
from pusa.tasks.base import Job
from pusa.tasks.completion import Completion
from pusa.tasks.extension import Extension
from pusa.tasks.image_to_video import ImageToVideo
from pusa.tasks.keyframes import Keyframe, Keyframes
from pusa.tasks.long_video import LongVideo
from pusa.tasks.loop import Loop
from pusa.tasks.text_to_video import TextToVideo
from pusa.tasks.transition import Transition

WINDOW = {"window": 31}
LONG = {"num_frames": 193, "overlap": 2, **WINDOW}  # ten segments: 31 frames, and nine times 18
LOOPED = (
    metrics.WRAP,
    metrics.WORST_WRAP,
    metrics.RING_JOIN,
    metrics.JERK,
    metrics.LARGEST,
    metrics.TRAVEL,
    metrics.SHOWN,
    metrics.FLICKER,
)
LASTING = (
    metrics.GROUND_DRIFT,
    metrics.SHAPE_DRIFT,
    metrics.SHARPNESS,
    metrics.SHOWN_FIRST,
    metrics.SHOWN_LAST,
    metrics.TRAVEL_FIRST,
    metrics.TRAVEL_LAST,
    metrics.SEGMENT_SEAMS,
    metrics.FLICKER,
)


@dataclass(frozen=True)
class Case:
    """A way to make a video for an unseen clip; without a job it is what the VAE returns of the clip.

    `given` are the frames of the video that stand for given ones, `like` what those should be. A slow case is made for
    one clip in three.
    """

    name: str
    told: str
    job: Callable[[Unseen], Job] | None
    metrics: tuple[Metric, ...]
    given: tuple[int, ...] = ()
    like: Callable[[Returned], np.ndarray] = lambda back: back.frames[:0]
    slow: bool = False


def _for(clip: Unseen, **more: Any) -> dict[str, Any]:
    """The settings of a clip's jobs."""
    return {"id": "measured", "prompt": clip.scene.caption, "seed": clip.scene.seed, **SETTINGS, **more}


def _frames_of(*latents: int) -> tuple[int, ...]:
    """The frames of a clip that its latent frames stand for."""
    return tuple(frame for latent in latents for frame in GEOMETRY.frames_of(latent))


def _in_loop(latents: int, num_frames: int) -> tuple[int, ...]:
    """The frames of a loop of `num_frames` that its first latent frames stand for."""
    count = num_frames // GEOMETRY.temporal
    return tuple(frame for latent in range(latents) for frame in GEOMETRY.frames_of_ring(latent, count))


def _ends(clip: Unseen) -> dict[int, Keyframe]:
    return {0: Keyframe(image=clip.first), -1: Keyframe(image=clip.last)}


START, END = _frames_of(0, 1), _frames_of(4, 5)
CASES = (
    Case(
        "the clips themselves", "What the VAE returns of the clips, for comparison; no model has part in it.", None,
        (metrics.ROUND_TRIP, *PROMPTED, metrics.FIRST_SEAM, metrics.BOUNDARIES, metrics.LARGEST, metrics.TRAVEL,
         metrics.SHOWN, metrics.FLICKER),
    ),
    Case(
        "text_to_video", "From the clip's caption.", lambda c: TextToVideo(**_for(c)),
        (*PROMPTED, metrics.BOUNDARIES, metrics.LARGEST, metrics.TRAVEL, metrics.SHOWN, metrics.FLICKER),
    ),
    Case(
        "image_to_video", "From the clip's first picture, multiplier 0, and its caption.",
        lambda c: ImageToVideo(image=c.first, multiplier=0, **_for(c)),
        (metrics.FIRST_PICTURE, metrics.LEAVING, *FOLLOWED, metrics.FLICKER),
        _frames_of(0), lambda back: back.first,
    ),
    Case(
        "image_to_video, no prompt", "The same without the caption.",
        lambda c: ImageToVideo(image=c.first, multiplier=0, **_for(c, prompt="")),
        (metrics.LEAVING, metrics.SHOWN, metrics.FLICKER), _frames_of(0), lambda back: back.first,
    ),
    Case(
        "keyframes", "The clip's first and last picture, preset exact.",
        lambda c: Keyframes(frames=_ends(c), preset="exact", **_for(c)),
        (metrics.FIRST_PICTURE, metrics.LAST_PICTURE, metrics.LEAVING, metrics.RETURNING, metrics.MIDDLE,
         metrics.SHOWN, metrics.FLICKER),
        _frames_of(0, 5), lambda back: np.concatenate([back.first, np.repeat(back.last, GEOMETRY.temporal, 0)]),
    ),
    Case(
        "transition", "Latent frames 0, 1 of the clip and -2, -1 of another on the same ground, multipliers 0, without"
        " a prompt.",
        lambda c: Transition(start=c.video, end=c.other, start_frames=(0, 1), end_frames=(-2, -1), preset="exact",
                             **_for(c, prompt="")),
        (metrics.KEPT_FIRST, metrics.KEPT_LAST, metrics.LEAVING, metrics.RETURNING, metrics.FLICKER),
        START + END, lambda back: np.concatenate([back.frames[list(START)], back.other[list(END)]]),
    ),
    Case(
        "transition, joint encoding", "The same with `encoding: joint`, as published.",
        lambda c: Transition(start=c.video, end=c.other, start_frames=(0, 1), end_frames=(-2, -1), preset="exact",
                             encoding="joint", **_for(c, prompt="")),
        (metrics.LEAVING, metrics.RETURNING), START + END,
    ),
    Case(
        "extension", "Latent frames 0 to 2 of the clip, preset exact.",
        lambda c: Extension(video=c.video, given=(0, 1, 2), preset="exact", **_for(c)),
        (metrics.KEPT, metrics.LEAVING, metrics.FIRST_MADE, *FOLLOWED, metrics.FLICKER),
        _frames_of(0, 1, 2), lambda back: back.frames[list(_frames_of(0, 1, 2))],
    ),
    Case(
        "extension, preset mochi", "Latent frames 0 to 3 of the clip, multipliers 0.1 to 0.4, as published.",
        lambda c: Extension(video=c.video, preset="mochi", **_for(c)),
        (metrics.KEPT, metrics.LEAVING, metrics.FIRST_MADE),
        _frames_of(0, 1, 2, 3), lambda back: back.frames[list(_frames_of(0, 1, 2, 3))],
    ),
    Case(
        "extension backwards", "Latent frames 1 to 3 of the clip at the end of the video, preset exact.",
        lambda c: Extension(video=c.video, direction="backwards", given=(1, 2, 3), preset="exact", **_for(c)),
        (metrics.KEPT, metrics.RETURNING, metrics.SHOWN, metrics.FLICKER),
        _frames_of(3, 4, 5), lambda back: back.frames[list(_frames_of(1, 2, 3))],
    ),
    Case(
        "completion", "The clip but for its latent frames 2 and 3, which are made; the others exact.",
        lambda c: Completion(video=c.video, made=(2, 3), **_for(c)),
        (metrics.KEPT_FIRST, metrics.KEPT_LAST, metrics.LEAVING, metrics.RETURNING, metrics.MADE,
         metrics.SHOWN, metrics.FLICKER),
        START + END, lambda back: back.frames[list(START + END)],
    ),
    Case("loop", "From the clip's caption, 30 frames.", lambda c: Loop(**WINDOW, **_for(c)), LOOPED),
    Case(
        "loop, 48 frames", "The same, longer than the 31 frames that the network sees at once.",
        lambda c: Loop(**WINDOW, **_for(c, num_frames=49)), LOOPED,
    ),
    Case(
        "loop from a picture", "Through the clip's first picture, multiplier 0.2, 30 frames.",
        lambda c: Loop(image=c.first, **WINDOW, **_for(c)),
        (metrics.FIRST_PICTURE, *LOOPED), _in_loop(1, 30), lambda back: np.repeat(back.first, GEOMETRY.temporal, 0),
    ),
    Case(
        "loop from a clip", "Through latent frames 1 to 3 of the clip, multipliers 0.5, 0.2, 0.5, 30 frames.",
        lambda c: Loop(video=c.video, **WINDOW, **_for(c)),
        (metrics.KEPT, *LOOPED), _in_loop(3, 30), lambda back: back.frames[list(_frames_of(1, 2, 3))],
    ),
    Case(
        "long_video", "From the clip's caption, 193 frames in ten segments; window 31, overlap 2.",
        lambda c: LongVideo(**_for(c, **LONG)), LASTING, slow=True,
    ),
    Case(
        "long_video, staggered", "The same with `stagger: 7` instead of segments.",
        lambda c: LongVideo(stagger=7, **_for(c, **LONG)), LASTING, slow=True,
    ),
)  # fmt: skip
