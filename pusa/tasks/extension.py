"""Extension: continue a clip from its latent frames, forwards or backwards in time."""

from typing import Literal

from pydantic import Field, model_validator

from pusa.backbones.family import Geometry
from pusa.tasks.base import (
    DEFAULT_PRESET,
    PRESETS,
    ClipFrame,
    ClipPath,
    Condition,
    FirstFrame,
    Multipliers,
    Pass,
    PresetName,
    per_frame,
    require_leading,
)
from pusa.tasks.segmented import Segmented


class Extension(Segmented):
    """A video that continues a clip, or leads up to it."""

    task: Literal["extension"] = "extension"
    video: ClipPath = Field(description="a clip, the latents of an earlier run, or job:ID")
    direction: Literal["forwards", "backwards"] = Field("forwards", description="continue the clip, or lead up to it")
    first_frame: FirstFrame = Field(
        0, description="frame of the clip at which reading starts; negative counts from the end"
    )
    given: tuple[ClipFrame, ...] | None = Field(
        None, min_length=1, description="latent frames of the clip to give; default 0 to 3, or backwards 1 to 4"
    )
    preset: PresetName = Field(
        DEFAULT_PRESET, description="multipliers that rise towards the new frames, as in published examples, or exact"
    )
    multipliers: Multipliers | None = Field(None, description="one for all, one for each, or a ramp like 0.1..0.4")

    @model_validator(mode="after")
    def _check_combinations(self) -> "Extension":
        if self.multipliers is not None:
            self.refuse_unused(["preset"], "`multipliers` is set")
        if self.given is not None and self.direction == "forwards":
            require_leading(self.given, 0)
        elif self.given is not None:
            require_leading(self.given, min(self.given))
        return self

    def conditions(self) -> list[Condition]:
        """Return the clip's latent frames: in place, or with the last of them at the video's end.

        Latent frame 0 is one picture and each other is several frames, so at the end of a video latent frame 0 would
        stand still: backwards, the given ones begin with 1.
        """
        backwards = self.direction == "backwards"
        given = self.given or ((1, 2, 3, 4) if backwards else (0, 1, 2, 3))
        if self.multipliers is None:
            published = PRESETS[self.preset].extension
            rising = [published[min(i, len(published) - 1)] for i in range(len(given))]
            multipliers = tuple(rising[::-1] if backwards else rising)
        else:
            multipliers = per_frame(self.multipliers, given, "multipliers")
        place = tuple(frame - max(given) - 1 for frame in given) if backwards else given
        return [Condition(self.video, given, place, multipliers, first_frame=self.first_frame)]

    def runs(self, geometry: Geometry) -> list[Pass]:
        """Return one run: all at once where the network can see all of it, else in segments, or staggered."""
        return [Pass(self.conditions(), self.timeline(geometry, self.direction == "backwards"))]
