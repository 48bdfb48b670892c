"""Keyframes: any number of pictures at any latent frames; start and end are the common case."""

from typing import Literal

from pydantic import Field

from pusa.strict import InputPath, Strict
from pusa.tasks.base import Condition, Job, Multiplier


class Keyframe(Strict):
    """One picture and how far it may be re-imagined."""

    image: InputPath
    multiplier: Multiplier = 0.0


class Keyframes(Job):
    """A video that passes through the given pictures."""

    task: Literal["keyframes"] = "keyframes"
    frames: dict[int, Keyframe] = Field(min_length=1, description="latent frame -> picture; negative from the end")

    def conditions(self) -> list[Condition]:
        """One picture each."""
        return [
            Condition(frame.image, (0,), (position,), (frame.multiplier,), still=True)
            for position, frame in self.frames.items()
        ]
