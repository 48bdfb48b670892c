"""Loop: a video whose last frame leads into its first, in what it shows and in how it moves.

The latents are a ring. At each step the network sees it cut open at another place, so that no place is an end for
long; only a network that is told a level per frame can be given the unknown beginning that each such view needs.
Nothing else makes a perfect ring of a prompt - and too perfect a one: with no frame before another, what moves one way
comes to rest. So a clip is made first, as for a prompt or a picture alone; its frames are noised again, those at the
join more, and the ring is closed by free frames. On the tiny model, 12 prompts, rings of 5 and 8 latent frames:

    method                                          change at the join    range of motion    shape as prompted
                                                    / between neighbours  (clip: 0.38)       (clip: 0.98)
    a clip, repeated                                7.8                   0.38               0.98
    clip, then a segment with both ends given       3.0                   0.35               0.9
    ring alone                                      1.0                   0.05               0.8
    clip, then ring (this)                          0.9                   0.17 - 0.32        0.9
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from pusa.errors import ConditionError
from pusa.strict import InputPath
from pusa.tasks.base import Condition, Job, Multipliers, Pass, spread
from pusa.tasks.segmented import latent_window
from pusa.windows import pieces, ring

if TYPE_CHECKING:
    from pusa.backbones.base import Geometry

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
        None, ge=1, le=10_000, description="frames that the network sees at once; by default num_frames"
    )

    cyclic: ClassVar[bool] = True

    @model_validator(mode="after")
    def _at_most_one(self) -> "Loop":
        if self.image is not None and self.video is not None:
            raise ValueError("a loop is made from `image` or from `video` or from the prompt alone, not from both")
        return self

    def passes(self, geometry: "Geometry") -> list[Pass]:
        """The clip, where none is given, and the ring that closes it."""
        frames = geometry.latent_frames(self.num_frames) - 1
        window = latent_window(self.window or self.num_frames, geometry)
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
