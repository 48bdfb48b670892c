"""Keyframes: give pictures at any latent frames; start and end are the common case."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from pusa.system.strict import Strict, read_integer_keys
from pusa.tasks.base import PRESETS, AnyFrame, Condition, Job, Multiplier, PicturePath, PresetName


class Keyframe(Strict):
    """One picture, and how far the model may change it."""

    image: PicturePath = Field(description="PNG, JPEG or WebP")
    multiplier: Multiplier | None = Field(None, description="0 keeps the picture exactly; default: the preset's")


class Keyframes(Job):
    """A video that passes through the given pictures."""

    task: Literal["keyframes"] = "keyframes"
    frames: Annotated[dict[AnyFrame, Keyframe], BeforeValidator(read_integer_keys)] = Field(
        min_length=1, description="latent frame -> picture; negative from the end"
    )
    preset: PresetName = Field(
        "exact", description="multipliers of the picture at 0 and of the others: 0, or as in published examples"
    )

    def conditions(self) -> list[Condition]:
        """Return one condition for each picture."""
        first, other = PRESETS[self.preset].keyframes
        conditions = []
        for position, frame in self.frames.items():
            multiplier = frame.multiplier
            if multiplier is None:
                multiplier = first if position == 0 else other
            conditions.append(Condition(frame.image, (0,), (position,), (multiplier,), still=True))
        return conditions
