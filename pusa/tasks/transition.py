"""Transition: the first latent frames of one clip, the last of another, and what lies between is made."""

from typing import Literal

from pydantic import Field

from pusa.strict import InputPath
from pusa.tasks.base import Condition, Job, Multiplier, spread


class Transition(Job):
    """A video that leads from clip `start` into clip `end`. Each clip is encoded by itself."""

    task: Literal["transition"] = "transition"
    start: InputPath
    end: InputPath
    start_frames: tuple[int, ...] = Field((0,), min_length=1, description="latent frames of `start` that are given")
    end_frames: tuple[int, ...] = Field((-3, -2, -1), min_length=1, description="latent frames of `end`, likewise")
    multipliers: Multiplier | tuple[Multiplier, ...] | None = Field(
        None, description="one for all, or start's then end's; by default 0.3 for start's frames and 0.8 for end's"
    )

    def conditions(self) -> list[Condition]:
        """The two clips' frames, each at the index it has in its own clip."""
        frames = (*self.start_frames, *self.end_frames)
        published = [0.3] * len(self.start_frames) + [0.8] * len(self.end_frames)
        multipliers = spread(published if self.multipliers is None else self.multipliers, frames, "multipliers")
        cut = len(self.start_frames)
        return [
            Condition(self.start, self.start_frames, self.start_frames, multipliers[:cut]),
            Condition(self.end, self.end_frames, self.end_frames, multipliers[cut:], from_end=True),
        ]
