"""Loop: make a video whose last frame leads into its first, in content and in motion.

The latents are a ring. At each step the network sees the ring cut open at another place, so that no place stays an end.
Such a view does not begin with a clip's first latent frame, and the frame before it is unknown. A network with one
level per latent frame can be given exactly that: an unknown frame at level 1.

A ring alone is seamless but nearly still: no frame comes before another, so motion in one direction averages out.
Therefore a clip is made first. Its frames are noised again, more at the join, and free frames close the ring. With
multipliers 1 only the ring remains; with 0 the clip stays unchanged. Motion in one direction must come back: at the
clip's own speed, 30 frames allow half of its range and 48 frames most of it. From `tests/benchmarks/loop_methods.py`,
tiny model, 12 prompts, 30 / 48 frames; the change from last frame to first, and the largest change between neighbours,
are relative to the mean change:

    method                                       last to first   largest       range of motion   frames as prompted
    a clip, repeated                             9.5             7.3           0.38              0.96
    clip, then a segment with both ends given    1.1  / 1.0      3.2  / 3.0    0.17 / 0.34       0.88 / 0.92
    ring alone                                   1.05 / 1.03     1.7  / 1.7    0.05 / 0.05       0.77 / 0.81
    clip kept, ring closed                       0.91 / 0.92     2.2  / 2.5    0.17 / 0.34       0.88 / 0.84
    clip noised again, ring closed (this)        0.94 / 0.96     1.95 / 2.2    0.15 / 0.31       0.89 / 0.87

The file is cut in the middle of a latent frame, so its first column is below 1. Where two latent frames meet, the
change is 1.4 of the mean in any video of this model, and 1.8 at the join of the ring.
"""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from pusa.backbones.family import Geometry
from pusa.diffusion.windows import ring, segments
from pusa.errors import ConditionError
from pusa.tasks.base import (
    MAX_FRAMES,
    ClipPath,
    Condition,
    FirstFrame,
    Job,
    Multipliers,
    Pass,
    PicturePath,
    per_frame,
)
from pusa.tasks.segmented import latent_window

CLOSING_SHARE = 0.4  # of the ring's latent frames
MIDDLE_MULTIPLIER, END_MULTIPLIER = 0.2, 0.5  # of the clip's latent frames
PICTURE_MULTIPLIER = 0.2


class Loop(Job):
    """A seamless loop of num_frames - 1 frames: the frame after its last would be its first."""

    task: Literal["loop"] = "loop"
    image: PicturePath | None = Field(None, description="a picture that the loop passes through")
    video: ClipPath | None = Field(None, description="or a clip that it passes through")
    first_frame: FirstFrame = Field(
        0, description="frame of the clip at which reading starts; negative counts from the end"
    )
    closing: int | None = Field(
        None,
        ge=1,
        le=MAX_FRAMES,
        description="latent frames that lead from the clip's end back to its start; default 40%",
    )
    multipliers: Multipliers | None = Field(
        None,
        description="of the clip's latent frames; default 0.2 in its middle to 0.5 at its ends, 0.2 for a picture",
    )
    window: int | None = Field(
        None, ge=1, le=MAX_FRAMES, description="frames that the network sees at once; default num_frames"
    )

    cyclic: ClassVar[bool] = True

    @model_validator(mode="after")
    def _check_combinations(self) -> "Loop":
        if self.image is not None and self.video is not None:
            raise ValueError("expected `image`, `video` or neither of them, not both")
        if self.video is None:
            self.refuse_unused(["first_frame"], "`video` is not set")
        if self.image is not None:
            self.refuse_unused(["closing"], "with `image` all other latent frames are free")
        return self

    def runs(self, geometry: Geometry) -> list[Pass]:
        """Return a run that makes the clip, where none is given, and one that closes the ring."""
        frames = geometry.latent_frames(self.num_frames) - 1
        window = frames + 1 if self.window is None else latent_window(self.window, geometry)
        if frames < 2 or window < 3:
            least = geometry.num_frames(3)
            raise ConditionError(f"expected num_frames and window of {least} or more, which is two latent frames")
        timeline = ring(frames, window)
        if self.image is not None:
            multipliers = PICTURE_MULTIPLIER if self.multipliers is None else self.multipliers
            picture = Condition(self.image, (0,), (0,), per_frame(multipliers, (0,), "multipliers"), still=True)
            return [Pass([picture], timeline)]
        clip = self._clip(frames)
        if self.video is not None:
            return [Pass([clip], timeline)]
        first = segments(len(clip.take) + 1, self.steps, window, min(2, window - 2))
        return [Pass([], first), Pass([clip], timeline)]

    def _clip(self, frames: int) -> Condition:
        """Return the clip's latent frames in the ring, without latent frame 0, which is one picture."""
        closing = max(1, round(frames * CLOSING_SHARE)) if self.closing is None else self.closing
        kept = frames - closing
        if kept < 1:
            raise ConditionError(f"closing {closing} leaves none of {frames} latent frames; expected 1..{frames - 1}")
        take = tuple(range(1, kept + 1))
        if self.multipliers is not None:
            multipliers = per_frame(self.multipliers, take, "multipliers")
        else:  # from END_MULTIPLIER at both ends down to MIDDLE_MULTIPLIER in the middle
            middle, rise = (kept - 1) / 2, END_MULTIPLIER - MIDDLE_MULTIPLIER
            multipliers = tuple(
                MIDDLE_MULTIPLIER + rise * (abs(i - middle) / middle if middle else 0) for i in range(kept)
            )
        return Condition(self.video, take, tuple(range(kept)), multipliers, first_frame=self.first_frame)
