"""Extension: the leading latent frames of a clip are given, the rest goes on from them."""

from typing import Literal

from pydantic import Field

from pusa.strict import InputPath
from pusa.tasks.base import Condition, Job, Multiplier, spread


class Extension(Job):
    """A video that starts as the given clip does."""

    task: Literal["extension"] = "extension"
    video: InputPath
    given: tuple[int, ...] = Field((0, 1, 2, 3), min_length=1, description="latent frames of the clip that are given")
    multipliers: Multiplier | tuple[Multiplier, ...] = (0.1, 0.2, 0.3, 0.4)

    def conditions(self) -> list[Condition]:
        """The clip's frames, in place."""
        multipliers = spread(self.multipliers, self.given, "multipliers")
        return [Condition(self.video, self.given, self.given, multipliers)]
