"""Completion: any latent frames of a clip are given, the others are made."""

from typing import Literal

from pydantic import Field

from pusa.strict import InputPath
from pusa.tasks.base import Condition, Job, Multiplier, spread


class Completion(Job):
    """A video that keeps the given frames of a clip and invents the rest."""

    task: Literal["completion"] = "completion"
    video: InputPath
    given: tuple[int, ...] = Field(min_length=1, description="latent frames of the clip that are kept")
    multipliers: Multiplier | tuple[Multiplier, ...] = 0.0

    def conditions(self) -> list[Condition]:
        """The clip's frames, in place."""
        return [Condition(self.video, self.given, self.given, spread(self.multipliers, self.given, "multipliers"))]
