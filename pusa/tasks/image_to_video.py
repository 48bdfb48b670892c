"""Image to video: one picture is given, as one latent frame."""

from typing import Literal

from pydantic import Field

from pusa.strict import InputPath
from pusa.tasks.base import Condition, Job, Multiplier


class ImageToVideo(Job):
    """A video that holds a picture, at its start unless `position` says otherwise."""

    task: Literal["image_to_video"] = "image_to_video"
    image: InputPath
    position: int = Field(0, description="latent frame that the picture becomes; negative counts from the end")
    multiplier: Multiplier = Field(0.0, description="0 keeps the picture exactly; 0.2-0.5 frees its motion")

    def conditions(self) -> list[Condition]:
        """The picture."""
        return [Condition(self.image, (0,), (self.position,), (self.multiplier,), still=True)]
