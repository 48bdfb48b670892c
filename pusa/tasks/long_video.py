"""Long video: any length, from a prompt alone, or going on from a picture or a clip."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from pusa.system.strict import InputPath
from pusa.tasks.base import ClipFrame, Condition, Multipliers, Pass, Segmented, require_leading, spread

if TYPE_CHECKING:
    from pusa.backbones.family import Geometry


class LongVideo(Segmented):
    """A video longer than the network can see at once."""

    task: Literal["long_video"] = "long_video"
    image: InputPath | None = Field(None, description="the picture it starts with")
    video: InputPath | None = Field(None, description="or the clip")
    first_frame: int = Field(0, description="frame of the clip at which reading starts; negative from its end")
    given: tuple[ClipFrame, ...] = Field(
        (0, 1, 2), min_length=1, description="latent frames of the clip that are given"
    )
    multipliers: Multipliers = Field(0.0, description="one for all, or one each, or a ramp 0.1..0.4")

    @model_validator(mode="after")
    def _at_most_one(self) -> "LongVideo":
        if self.image is not None and self.video is not None:
            raise ValueError("long_video starts with `image` or with `video`, not with both")
        if self.video is None:
            self.refuse(["first_frame", "given"], "there is no `video`")
        require_leading(self.given, 0)
        if self.video is None and self.image is None:
            self.refuse(["multipliers"], "nothing is given")
        return self

    def conditions(self) -> list[Condition]:
        """The picture, or the clip's frames in place, if there is one."""
        if self.image is not None:
            return [Condition(self.image, (0,), (0,), spread(self.multipliers, (0,), "multipliers"), still=True)]
        if self.video is not None:
            multipliers = spread(self.multipliers, self.given, "multipliers")
            return [Condition(self.video, self.given, self.given, multipliers, first_frame=self.first_frame)]
        return []

    def passes(self, geometry: "Geometry") -> list[Pass]:
        """Segment by segment, or staggered."""
        return [Pass(self.conditions(), self.course(geometry))]
