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
    multipliers: Multiplier | tuple[Multiplier, ...] = Field((0.3, 0.8, 0.8, 0.8), description="start's, then end's")

    def conditions(self) -> list[Condition]:
        """The two clips' frames, each at the index it has in its own clip."""
        frames = (*self.start_frames, *self.end_frames)
        multipliers = spread(self.multipliers, frames, "multipliers")
        cut = len(self.start_frames)
        return [
            Condition(self.start, self.start_frames, self.start_frames, multipliers[:cut]),
            Condition(self.end, self.end_frames, self.end_frames, multipliers[cut:], from_end=True),
        ]
