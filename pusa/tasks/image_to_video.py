"""Image to video: give one picture as one latent frame."""

from typing import Literal

from pydantic import Field, model_validator

from pusa.tasks.base import PRESETS, AnyFrame, Condition, Job, Multiplier, PicturePath, PresetName


class ImageToVideo(Job):
    """A video that contains a picture, by default at its start."""

    task: Literal["image_to_video"] = "image_to_video"
    image: PicturePath = Field(description="PNG, JPEG or WebP")
    position: AnyFrame = Field(0, description="latent frame that the picture becomes; negative counts from the end")
    preset: PresetName = Field("exact", description="the multiplier: 0, or as in published examples")
    multiplier: Multiplier | None = Field(None, description="0 keeps the picture exactly; 0.2-0.5 frees its motion")

    @model_validator(mode="after")
    def _check_combinations(self) -> "ImageToVideo":
        if self.multiplier is not None:
            self.refuse_unused(["preset"], "`multiplier` is set")
        return self

    def conditions(self) -> list[Condition]:
        """Return the picture."""
        multiplier = PRESETS[self.preset].image_to_video if self.multiplier is None else self.multiplier
        return [Condition(self.image, (0,), (self.position,), (multiplier,), still=True)]
