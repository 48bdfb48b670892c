"""Long video: any length, from a prompt alone, or starting with a picture or a clip."""

from typing import Literal

from pydantic import Field, model_validator

from pusa.backbones.family import Geometry
from pusa.tasks.base import (
    ClipFrame,
    ClipPath,
    Condition,
    FirstFrame,
    Multipliers,
    Pass,
    PicturePath,
    per_frame,
    require_leading,
)
from pusa.tasks.segmented import Segmented


class LongVideo(Segmented):
    """A video longer than the network can see at once."""

    task: Literal["long_video"] = "long_video"
    image: PicturePath | None = Field(None, description="the picture it starts with")
    video: ClipPath | None = Field(None, description="or the clip")
    first_frame: FirstFrame = Field(
        0, description="frame of the clip at which reading starts; negative counts from the end"
    )
    given: tuple[ClipFrame, ...] = Field((0, 1, 2), min_length=1, description="latent frames of the clip to give")
    multipliers: Multipliers = Field(0.0, description="one for all, one for each, or a ramp like 0.1..0.4")

    @model_validator(mode="after")
    def _check_combinations(self) -> "LongVideo":
        if self.image is not None and self.video is not None:
            raise ValueError("expected `image` or `video` to start with, not both")
        if self.video is None:
            self.refuse_unused(["first_frame", "given"], "`video` is not set")
        require_leading(self.given, 0)
        if self.video is None and self.image is None:
            self.refuse_unused(["multipliers"], "neither `image` nor `video` is set")
        return self

    def conditions(self) -> list[Condition]:
        """Return the picture, or the clip's latent frames in place, if there is one."""
        if self.image is not None:
            return [Condition(self.image, (0,), (0,), per_frame(self.multipliers, (0,), "multipliers"), still=True)]
        if self.video is not None:
            multipliers = per_frame(self.multipliers, self.given, "multipliers")
            return [Condition(self.video, self.given, self.given, multipliers, first_frame=self.first_frame)]
        return []

    def runs(self, geometry: Geometry) -> list[Pass]:
        """Return one run, in segments or staggered."""
        return [Pass(self.conditions(), self.timeline(geometry))]
