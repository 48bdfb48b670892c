"""Completion: any latent frames of a clip are given, the others are made."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from pusa.diffusion.windows import whole
from pusa.errors import ConditionError
from pusa.system.strict import InputPath
from pusa.tasks.base import Condition, Job, Multipliers, Pass, positions, spread

if TYPE_CHECKING:
    from pusa.backbones.family import Geometry


class Completion(Job):
    """A video that keeps the given frames of a clip and invents the rest."""

    task: Literal["completion"] = "completion"
    video: InputPath = Field(description="a clip, or the latents of an earlier run")
    first_frame: int = Field(0, description="frame of the clip at which reading starts; negative from its end")
    given: tuple[int, ...] | None = Field(None, min_length=1, description="latent frames of the clip that are kept")
    made: tuple[int, ...] | None = Field(None, min_length=1, description="or: keep all but these")
    multipliers: Multipliers = Field(0.0, description="one for all, or one each, or a ramp 0.1..0.4")

    @model_validator(mode="after")
    def _one_of_two(self) -> "Completion":
        if (self.given is None) == (self.made is None):
            raise ValueError("completion wants `given`, the latent frames to keep, or `made`, those to make; not both")
        return self

    def passes(self, geometry: "Geometry") -> list[Pass]:
        """The clip's frames, in place."""
        count = geometry.latent_frames(self.num_frames)
        made = set(positions(self.made or (), count, "made"))
        given = positions(self.given or (), count, "given") or tuple(f for f in range(count) if f not in made)
        if not given:
            raise ConditionError(f"made {list(self.made or ())} leaves nothing of {count} latent frames to give")
        multipliers = spread(self.multipliers, given, "multipliers")
        return [Pass([Condition(self.video, given, given, multipliers, first_frame=self.first_frame)], whole(count))]
