"""Transition: the first latent frames of one clip, the last of another, and what lies between is made."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pusa.system.strict import InputPath
from pusa.tasks.base import ClipFrame, Condition, Job, Multipliers, Preset, spread

PRESETS: dict[Preset, tuple[float, float]] = {"mochi": (0.3, 0.8), "wan": (0.3, 0.8), "exact": (0.0, 0.0)}


class Transition(Job):
    """A video that leads from clip `start` into clip `end`."""

    task: Literal["transition"] = "transition"
    start: InputPath = Field(description="the clip it begins with")
    end: InputPath = Field(description="the clip it ends with")
    start_frames: tuple[ClipFrame, ...] = Field((0,), min_length=1, description="latent frames of `start`: 0, 1, ...")
    end_frames: tuple[Annotated[int, Field(lt=0)], ...] = Field(
        (-3, -2, -1), min_length=1, description="latent frames of `end`, from its end: -1, -2, ..."
    )
    start_first_frame: int = Field(0, description="frame of `start` at which reading starts; -1 is its last")
    end_first_frame: int | None = Field(
        None,
        description="frame of `end` at which reading starts, for a video that ends with its beginning; by default"
        " it ends with its end",
    )
    preset: Preset = Field("mochi", description="0.3 for start's frames and 0.8 for end's, as published, or exact")
    multipliers: Multipliers | None = Field(None, description="one for all, or start's then end's, or a ramp 0.1..0.4")
    encoding: Literal["each", "joint"] = Field(
        "each",
        description="each clip by itself, `end` read from its end; or as published: the first frames of both, joined"
        " and encoded as one clip",
    )

    @model_validator(mode="after")
    def _nothing_idle(self) -> "Transition":
        if self.multipliers is not None:
            self.refuse(["preset"], "multipliers are given")
        if self.encoding == "joint":
            self.refuse(["start_first_frame", "end_first_frame"], "a joint encoding takes the first frames of both")
        return self

    def conditions(self) -> list[Condition]:
        """The two clips' frames, each at the index it has in its own clip."""
        frames = (*self.start_frames, *self.end_frames)
        of_start, of_end = PRESETS[self.preset]
        published = [of_start] * len(self.start_frames) + [of_end] * len(self.end_frames)
        multipliers = spread(published if self.multipliers is None else self.multipliers, frames, "multipliers")
        if self.encoding == "joint":
            return [Condition(self.start, frames, frames, multipliers, joined=self.end)]
        cut = len(self.start_frames)
        start = Condition(
            self.start, self.start_frames, self.start_frames, multipliers[:cut], first_frame=self.start_first_frame
        )
        return [start, self._end(multipliers[cut:])]

    def _end(self, multipliers: tuple[float, ...]) -> Condition:
        if self.end_first_frame is None:
            return Condition(self.end, self.end_frames, self.end_frames, multipliers, from_end=True)
        # From 1: latent frame 0 is a single picture where the others are several, and would stand still.
        take = tuple(frame - min(self.end_frames) + 1 for frame in self.end_frames)
        return Condition(self.end, take, self.end_frames, multipliers, first_frame=self.end_first_frame)
