"""Extension: some latent frames of a clip are given, and what comes after it, or came before, is made."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from pusa.system.strict import InputPath
from pusa.tasks.base import ClipFrame, Condition, Multipliers, Pass, Preset, Segmented, require_leading, spread

if TYPE_CHECKING:
    from pusa.backbones.family import Geometry

# For four given frames; the last stands for any further ones.
PRESETS: dict[Preset, tuple[float, ...]] = {
    "mochi": (0.1, 0.2, 0.3, 0.4),
    "wan": (0.0, 0.3, 0.5, 0.7),
    "exact": (0.0,),
}


class Extension(Segmented):
    """A video that goes on from a clip, or leads up to it."""

    task: Literal["extension"] = "extension"
    video: InputPath = Field(description="a clip, or the latents of an earlier run")
    direction: Literal["forwards", "backwards"] = Field("forwards", description="go on from the clip, or lead up to it")
    first_frame: int = Field(0, description="frame of the clip at which reading starts; negative from its end")
    given: tuple[ClipFrame, ...] | None = Field(
        None, min_length=1, description="latent frames of the clip that are given; 0 to 3, or backwards 1 to 4"
    )
    preset: Preset = Field("mochi", description="multipliers, rising towards the new frames, as published, or exact")
    multipliers: Multipliers | None = Field(None, description="one for all, or one each, or a ramp 0.1..0.4")

    @model_validator(mode="after")
    def _nothing_idle(self) -> "Extension":
        if self.multipliers is not None:
            self.refuse(["preset"], "multipliers are given")
        if self.given is not None and self.direction == "forwards":
            require_leading(self.given, 0)
        elif self.given is not None:
            require_leading(self.given, min(self.given))
        return self

    def conditions(self) -> list[Condition]:
        """The clip's frames: in place, or with the last of them at the video's end.

        Latent frame 0 is a single picture where the others are several, so that at the end it would stand still:
        going backwards, the given ones begin with 1.
        """
        backwards = self.direction == "backwards"
        given = self.given or ((1, 2, 3, 4) if backwards else (0, 1, 2, 3))
        if self.multipliers is None:
            published = PRESETS[self.preset]
            rising = [published[min(i, len(published) - 1)] for i in range(len(given))]
            multipliers = tuple(rising[::-1] if backwards else rising)
        else:
            multipliers = spread(self.multipliers, given, "multipliers")
        place = tuple(frame - max(given) - 1 for frame in given) if backwards else given
        return [Condition(self.video, given, place, multipliers, first_frame=self.first_frame)]

    def passes(self, geometry: "Geometry") -> list[Pass]:
        """At once where the network can see it all; else segment by segment, or staggered."""
        return [Pass(self.conditions(), self.course(geometry, self.direction == "backwards"))]
