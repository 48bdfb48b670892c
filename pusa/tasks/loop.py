"""Loop: a video whose last frame leads into its first, in what it shows and in how it moves.

The latents are a ring. At each step the network sees it cut open at another place, so that no place is an end for
long. What such a view begins with is no clip's first latent frame, and what came before it is unknown: a network that
is told one level per frame can be shown just that, an unknown frame at level 1.

A ring alone is seamless, and nearly at rest: with no frame before another, what moves one way averages out. So a clip
is made first; its frames are noised again, those at the join more, and free frames close the ring. With multipliers 1
it is the ring alone, with 0 the clip stays as it is. What moves one way must come back: at the clip's own speed, 30
frames allow half of its range, 48 frames most of it. From `tests/benchmarks/loop_methods.py`, tiny model, 12 prompts,
30 / 48 frames; the change from last frame to first, and the largest between neighbours, are over the mean change:

    method                                       last to first   largest       range of motion   frames as prompted
    a clip, repeated                             9.5             7.3           0.38              0.96
    clip, then a segment with both ends given    1.1  / 1.0      3.2  / 3.0    0.17 / 0.34       0.88 / 0.92
    ring alone                                   1.05 / 1.03     1.7  / 1.7    0.05 / 0.05       0.77 / 0.81
    clip kept, ring closed                       0.91 / 0.92     2.2  / 2.5    0.17 / 0.34       0.88 / 0.84
    clip noised again, ring closed (this)        0.94 / 0.96     1.95 / 2.2    0.15 / 0.31       0.89 / 0.87

The file is cut in the middle of a latent frame, which is why its first column is below 1. Where two latent frames meet,
the change is 1.4 of the mean in any video of this model, and 1.8 at the ring's join.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from pusa.diffusion.windows import pieces, ring
from pusa.errors import ConditionError
from pusa.system.strict import InputPath
from pusa.tasks.base import MAX_FRAMES, Condition, Job, Multipliers, Pass, latent_window, spread

if TYPE_CHECKING:
    from pusa.backbones.family import Geometry

CLOSING = 0.4  # of the ring
LEAST, MOST = 0.2, 0.5  # multipliers of the clip's middle and of its ends
PICTURE = 0.2


class Loop(Job):
    """A seamless loop of num_frames - 1 frames: the frame after its last would be its first."""

    task: Literal["loop"] = "loop"
    image: InputPath | None = Field(None, description="a picture that the loop passes through")
    video: InputPath | None = Field(None, description="or a clip that it goes through")
    first_frame: int = Field(0, description="frame of the clip at which reading starts; negative from its end")
    closing: int | None = Field(
        None, ge=1, description="latent frames that lead from the clip's end back to its start; by default 40%"
    )
    multipliers: Multipliers | None = Field(
        None,
        description="of the clip's latent frames; by default 0.2 in its middle to 0.5 at its ends, 0.2 of a picture",
    )
    window: int | None = Field(
        None, ge=1, le=MAX_FRAMES, description="frames that the network sees at once; by default num_frames"
    )

    cyclic: ClassVar[bool] = True

    @model_validator(mode="after")
    def _at_most_one(self) -> "Loop":
        if self.image is not None and self.video is not None:
            raise ValueError("a loop is made from `image` or from `video` or from the prompt alone, not from both")
        if self.video is None:
            self.refuse(["first_frame"], "there is no `video`")
        if self.image is not None:
            self.refuse(["closing"], "a picture is given; all but its latent frame is free")
        return self

    def passes(self, geometry: "Geometry") -> list[Pass]:
        """The clip, where none is given, and the ring that closes it."""
        frames = geometry.latent_frames(self.num_frames) - 1
        window = frames + 1 if self.window is None else latent_window(self.window, geometry)
        if frames < 2 or window < 3:
            least = geometry.num_frames(3)
            raise ConditionError(f"a loop wants num_frames and window of {least} or more, for two latent frames")
        course = ring(frames, window)
        if self.image is not None:
            multipliers = spread(PICTURE if self.multipliers is None else self.multipliers, (0,), "multipliers")
            return [Pass([Condition(self.image, (0,), (0,), multipliers, still=True)], course)]
        clip = self._clip(frames)
        if self.video is not None:
            return [Pass([clip], course)]
        first = pieces(len(clip.take) + 1, self.steps, window, min(2, window - 2))
        return [Pass([], first), Pass([clip], course)]

    def _clip(self, frames: int) -> Condition:
        """The clip's latent frames in the ring. Its frame 0, a single picture where the others are several, is none."""
        closing = max(1, round(frames * CLOSING)) if self.closing is None else self.closing
        kept = frames - closing
        if kept < 1:
            raise ConditionError(
                f"closing {closing} leaves nothing of {frames} latent frames; allowed are 1..{frames - 1}"
            )
        take = tuple(range(1, kept + 1))
        multipliers = _v_shape(kept) if self.multipliers is None else spread(self.multipliers, take, "multipliers")
        return Condition(self.video, take, tuple(range(kept)), multipliers, first_frame=self.first_frame)


def _v_shape(count: int) -> tuple[float, ...]:
    """From MOST at both ends down to LEAST in the middle."""
    middle = (count - 1) / 2
    return tuple(LEAST + (MOST - LEAST) * (abs(i - middle) / middle if middle else 0) for i in range(count))
