"""Define the cases of the quality report: for each, the job that is made for an unseen clip, and its metrics."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pusa.backbones.family import Family
from pusa.evaluate import metrics
from pusa.evaluate.metrics import FOLLOWED, LONG_OVERLAP, PROMPTED, Metric, segment_frames
from pusa.evaluate.unseen import UnseenClip, job_settings
from pusa.tasks.base import Job
from pusa.tasks.completion import Completion
from pusa.tasks.extension import Extension
from pusa.tasks.image_to_video import ImageToVideo
from pusa.tasks.keyframes import Keyframe, Keyframes
from pusa.tasks.long_video import LongVideo
from pusa.tasks.loop import Loop
from pusa.tasks.text_to_video import TextToVideo
from pusa.tasks.transition import Transition
from pusa.tiny.shapes import clip_length

LONG_LOOP_FRAMES, LONG_FRAMES = 49, 193
STAGGER = 7
LOOP_METRICS = (
    metrics.LOOP_SEAM,
    metrics.WORST_LOOP_SEAM,
    metrics.RING_JOIN,
    metrics.WRAP_JERK,
    metrics.LARGEST_CHANGE,
    metrics.MOTION_RANGE,
    metrics.AS_CAPTIONED,
    metrics.GROUND_FLICKER,
)
LONG_METRICS = (
    metrics.GROUND_DRIFT,
    metrics.SHAPE_DRIFT,
    metrics.SHARPNESS,
    metrics.AS_CAPTIONED_START,
    metrics.AS_CAPTIONED_END,
    metrics.MOTION_RANGE_START,
    metrics.MOTION_RANGE_END,
    metrics.SEGMENT_SEAMS,
    metrics.GROUND_FLICKER,
)


@dataclass(frozen=True)
class Case:
    """A way to make a video for an unseen clip. Without a job it is the clip itself after the VAE.

    A slow case is made for one clip in three.
    """

    name: str
    description: str
    job: Callable[[UnseenClip], Job] | None
    metrics: tuple[Metric, ...]
    slow: bool = False


def quality_cases(family: Family) -> tuple[Case, ...]:
    """Return all cases, in the order of the report, with sizes and multipliers for this family."""
    return (*_prompt_and_picture_cases(family), *_clip_cases(family), *_loop_cases(family), *_long_cases(family))


def _settings(clip: UnseenClip, family: Family, **more: Any) -> dict[str, Any]:
    """Return the settings that the jobs for a clip share, and `more`."""
    settings = job_settings(family)
    return {"id": "measured", "prompt": clip.scene.caption, "seed": clip.scene.seed, **settings, **more}


def _prompt_and_picture_cases(family: Family) -> tuple[Case, ...]:
    def settings(clip: UnseenClip, **more: Any) -> dict[str, Any]:
        return _settings(clip, family, **more)

    return (
        Case(
            "the clips themselves", "The clips after the VAE, for comparison; the transformer is not used.", None,
            (metrics.ROUND_TRIP_PSNR, *PROMPTED, metrics.FIRST_SEAM, metrics.LATENT_SEAMS, metrics.LARGEST_CHANGE,
             metrics.MOTION_RANGE, metrics.AS_CAPTIONED, metrics.GROUND_FLICKER),
        ),
        Case(
            "text_to_video", "From the clip's caption.", lambda c: TextToVideo(**settings(c)),
            (*PROMPTED, metrics.LATENT_SEAMS, metrics.LARGEST_CHANGE, metrics.MOTION_RANGE, metrics.AS_CAPTIONED,
             metrics.GROUND_FLICKER),
        ),
        Case(
            "image_to_video", "From the clip's caption and its first picture, multiplier 0.",
            lambda c: ImageToVideo(image=c.first, multiplier=0, **settings(c)),
            (metrics.FIRST_PICTURE_PSNR, metrics.SEAM_TO_MADE, *FOLLOWED, metrics.GROUND_FLICKER),
        ),
        Case(
            "image_to_video, no prompt", "The same without the caption.",
            lambda c: ImageToVideo(image=c.first, multiplier=0, **settings(c, prompt="")),
            (metrics.SEAM_TO_MADE, metrics.AS_CAPTIONED, metrics.GROUND_FLICKER),
        ),
        Case(
            "keyframes", "From the clip's caption and its first and last picture, preset exact.",
            lambda c: Keyframes(
                frames={0: Keyframe(image=c.first), -1: Keyframe(image=c.last)}, preset="exact", **settings(c)
            ),
            (metrics.FIRST_PICTURE_PSNR, metrics.LAST_PICTURE_PSNR, metrics.SEAM_TO_MADE, metrics.SEAM_TO_GIVEN,
             metrics.MIDDLE_PSNR, metrics.AS_CAPTIONED, metrics.GROUND_FLICKER),
        ),
    )  # fmt: skip


def _clip_cases(family: Family) -> tuple[Case, ...]:
    latent_frames = family.geometry.latent_frames(clip_length(family.geometry))
    made = tuple(range(2, latent_frames - 2))
    published = ", ".join(f"{multiplier:g}" for multiplier in family.presets[family.preset].extension)

    def settings(clip: UnseenClip, **more: Any) -> dict[str, Any]:
        return _settings(clip, family, **more)

    def transition(clip: UnseenClip, **more: Any) -> Transition:
        latents = {"start_frames": (0, 1), "end_frames": (-2, -1), "preset": "exact"}
        return Transition(start=clip.video, end=clip.other, **latents, **more, **settings(clip, prompt=""))

    return (
        Case(
            "transition", "Latent frames 0, 1 of the clip and -2, -1 of another clip on the same ground, multipliers 0,"
            " without a prompt.", transition,
            (metrics.GIVEN_PSNR_START, metrics.GIVEN_PSNR_END, metrics.SEAM_TO_MADE, metrics.SEAM_TO_GIVEN,
             metrics.GROUND_FLICKER),
        ),
        Case(
            "transition, joint encoding", "The same with `encoding: joint`, as published.",
            lambda c: transition(c, encoding="joint"), (metrics.SEAM_TO_MADE, metrics.SEAM_TO_GIVEN),
        ),
        Case(
            "extension", "From the clip's caption and its latent frames 0 to 2, preset exact.",
            lambda c: Extension(video=c.video, given=(0, 1, 2), preset="exact", **settings(c)),
            (metrics.GIVEN_PSNR, metrics.SEAM_TO_MADE, metrics.FIRST_MADE_PSNR, *FOLLOWED, metrics.GROUND_FLICKER),
        ),
        Case(
            f"extension, preset {family.preset}", f"The same with latent frames 0 to 3, multipliers {published}, as"
            " published.", lambda c: Extension(video=c.video, preset=family.preset, **settings(c)),
            (metrics.GIVEN_PSNR, metrics.SEAM_TO_MADE, metrics.FIRST_MADE_PSNR),
        ),
        Case(
            "extension backwards", "The same with latent frames 1 to 3 at the end of the video, preset exact.",
            lambda c: Extension(video=c.video, direction="backwards", given=(1, 2, 3), preset="exact", **settings(c)),
            (metrics.GIVEN_PSNR, metrics.SEAM_TO_GIVEN, metrics.AS_CAPTIONED, metrics.GROUND_FLICKER),
        ),
        Case(
            "completion", "From the clip's caption and all its latent frames, multipliers 0, except "
            f"{', '.join(map(str, made))}, which are made.",
            lambda c: Completion(video=c.video, made=made, **settings(c)),
            (metrics.GIVEN_PSNR_START, metrics.GIVEN_PSNR_END, metrics.SEAM_TO_MADE, metrics.SEAM_TO_GIVEN,
             metrics.MADE_PSNR, metrics.AS_CAPTIONED, metrics.GROUND_FLICKER),
        ),
    )  # fmt: skip


def _loop_cases(family: Family) -> tuple[Case, ...]:
    window = clip_length(family.geometry)
    frames = window - 1
    through_clip = Loop(id="example", video=Path("clip.mp4"), num_frames=window, window=window)
    (given,) = through_clip.passes(family.geometry)[0].conditions

    def settings(clip: UnseenClip, **more: Any) -> dict[str, Any]:
        return _settings(clip, family, window=window, **more)

    return (
        Case("loop", f"From the clip's caption, {frames} frames.", lambda c: Loop(**settings(c)), LOOP_METRICS),
        Case(
            f"loop, {LONG_LOOP_FRAMES - 1} frames", f"The same, longer than the {window} frames that the transformer"
            " sees at once.", lambda c: Loop(**settings(c, num_frames=LONG_LOOP_FRAMES)), LOOP_METRICS,
        ),
        Case(
            "loop from a picture", f"Through the clip's first picture, multiplier 0.2, {frames} frames.",
            lambda c: Loop(image=c.first, **settings(c)), (metrics.FIRST_PICTURE_PSNR, *LOOP_METRICS),
        ),
        Case(
            "loop from a clip", f"Through the clip: {given.describe()}; {frames} frames.",
            lambda c: Loop(video=c.video, **settings(c)),
            (metrics.GIVEN_PSNR, *LOOP_METRICS),
        ),
    )  # fmt: skip


def _long_cases(family: Family) -> tuple[Case, ...]:
    window = clip_length(family.geometry)
    added = segment_frames(window, family.geometry)
    segments = 1 - (window - LONG_FRAMES) // added

    def long_video(clip: UnseenClip, **more: Any) -> LongVideo:
        size = {"num_frames": LONG_FRAMES, "window": window, "overlap": LONG_OVERLAP}
        return LongVideo(**_settings(clip, family, **size, **more))

    return (
        Case(
            "long_video", f"From the clip's caption, {LONG_FRAMES} frames in {segments} segments: {window} frames, then"
            f" {added} at a time; window {window}, overlap {LONG_OVERLAP}.", long_video, LONG_METRICS, slow=True,
        ),
        Case(
            "long_video, staggered", f"The same with `stagger: {STAGGER}` instead of segments.",
            lambda c: long_video(c, stagger=STAGGER), LONG_METRICS, slow=True,
        ),
    )  # fmt: skip
