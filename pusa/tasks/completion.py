"""Completion: keep any latent frames of a clip and make the others."""

from typing import Literal

from pydantic import Field, model_validator

from pusa.backbones.family import Geometry
from pusa.diffusion.windows import whole
from pusa.errors import ConditionError
from pusa.tasks.base import (
    AnyFrame,
    ClipPath,
    Condition,
    FirstFrame,
    Job,
    Multipliers,
    Pass,
    per_frame,
    resolve_positions,
)


class Completion(Job):
    """A video that keeps the given latent frames of a clip; the rest is made."""

    task: Literal["completion"] = "completion"
    video: ClipPath = Field(description="a clip, the latents of an earlier run, or job:ID")
    first_frame: FirstFrame = Field(
        0, description="frame of the clip at which reading starts; negative counts from the end"
    )
    given: tuple[AnyFrame, ...] | None = Field(None, min_length=1, description="latent frames of the clip to keep")
    made: tuple[AnyFrame, ...] | None = Field(None, min_length=1, description="or the latent frames to make")
    multipliers: Multipliers = Field(0.0, description="one for all, one for each, or a ramp like 0.1..0.4")

    @model_validator(mode="after")
    def _one_of_two(self) -> "Completion":
        if (self.given is None) == (self.made is None):
            raise ValueError("expected either `given`, the latent frames to keep, or `made`, the latent frames to make")
        return self

    def runs(self, geometry: Geometry) -> list[Pass]:
        """Return one run with the clip's latent frames in place."""
        count = geometry.latent_frames(self.num_frames)
        made = set(resolve_positions(self.made or (), count, "made"))
        given = resolve_positions(self.given or (), count, "given") or tuple(f for f in range(count) if f not in made)
        if not given:
            raise ConditionError(f"made {list(self.made or ())} leaves none of the {count} latent frames to keep")
        multipliers = per_frame(self.multipliers, given, "multipliers")
        return [Pass([Condition(self.video, given, given, multipliers, first_frame=self.first_frame)], whole(count))]
