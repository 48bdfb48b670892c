"""Image to video: one picture is given, as one latent frame."""

from typing import Literal

from pydantic import Field, model_validator

from pusa.system.strict import InputPath
from pusa.tasks.base import Condition, Job, Multiplier, Preset

PRESETS: dict[Preset, float] = {"exact": 0.0, "mochi": 0.2, "wan": 0.2}  # published: anything in 0..0.4


class ImageToVideo(Job):
    """A video that holds a picture, at its start unless `position` says otherwise."""

    task: Literal["image_to_video"] = "image_to_video"
    image: InputPath = Field(description="PNG, JPEG or WebP")
    position: int = Field(0, description="latent frame that the picture becomes; negative counts from the end")
    preset: Preset = Field("exact", description="the multiplier: 0, or as in the published examples of mochi or wan")
    multiplier: Multiplier | None = Field(None, description="0 keeps the picture exactly; 0.2-0.5 frees its motion")

    @model_validator(mode="after")
    def _nothing_idle(self) -> "ImageToVideo":
        if self.multiplier is not None:
            self.refuse(["preset"], "a multiplier is given")
        return self

    def conditions(self) -> list[Condition]:
        """The picture."""
        multiplier = PRESETS[self.preset] if self.multiplier is None else self.multiplier
        return [Condition(self.image, (0,), (self.position,), (multiplier,), still=True)]
