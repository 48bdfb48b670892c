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
    multipliers: Multiplier | tuple[Multiplier, ...] | None = Field(
        None, description="one for all or one each; by default 0.1 for the first given frame, 0.2 for the next, ..."
    )

    def conditions(self) -> list[Condition]:
        """The clip's frames, in place."""
        rising = [min(1.0, 0.1 * (i + 1)) for i in range(len(self.given))]
        multipliers = spread(rising if self.multipliers is None else self.multipliers, self.given, "multipliers")
        return [Condition(self.video, self.given, self.given, multipliers)]
