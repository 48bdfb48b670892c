"""Keyframes: any number of pictures at any latent frames; start and end are the common case."""

from typing import Literal

from pydantic import Field

from pusa.system.strict import InputPath, Strict
from pusa.tasks.base import Condition, Job, Multiplier, Preset

# The published examples: {0: 0.3, 20: 0.7} and {0: 0.3, 13: 0.7, 27: 0.7} for Mochi, {0: 0.2, 20: 0.5} for Wan.
PRESETS: dict[Preset, tuple[float, float]] = {"exact": (0.0, 0.0), "mochi": (0.3, 0.7), "wan": (0.2, 0.5)}


class Keyframe(Strict):
    """One picture and how far it may be re-imagined."""

    image: InputPath = Field(description="PNG, JPEG or WebP")
    multiplier: Multiplier | None = Field(None, description="by default the preset's")


class Keyframes(Job):
    """A video that passes through the given pictures."""

    task: Literal["keyframes"] = "keyframes"
    frames: dict[int, Keyframe] = Field(min_length=1, description="latent frame -> picture; negative from the end")
    preset: Preset = Field(
        "exact", description="multipliers of the picture at 0 and of the others: 0 and 0, or published"
    )

    def conditions(self) -> list[Condition]:
        """One picture each."""
        first, other = PRESETS[self.preset]
        return [
            Condition(frame.image, (0,), (position,), (self._multiplier(frame, position, first, other),), still=True)
            for position, frame in self.frames.items()
        ]

    @staticmethod
    def _multiplier(frame: Keyframe, position: int, first: float, other: float) -> float:
        if frame.multiplier is not None:
            return frame.multiplier
        return first if position == 0 else other
