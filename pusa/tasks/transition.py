"""Transition: give the first latent frames of one clip and the last of another, and make the frames between."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pusa.tasks.base import (
    DEFAULT_PRESET,
    MAX_FRAMES,
    PRESETS,
    ClipFrame,
    ClipPath,
    Condition,
    FirstFrame,
    Job,
    Multipliers,
    PresetName,
    per_frame,
)


class Transition(Job):
    """A video that leads from clip `start` into clip `end`."""

    task: Literal["transition"] = "transition"
    start: ClipPath = Field(description="the clip that the video begins with")
    end: ClipPath = Field(description="the clip that the video ends with")
    start_frames: tuple[ClipFrame, ...] = Field((0,), min_length=1, description="latent frames of `start`: 0, 1, ...")
    end_frames: tuple[Annotated[int, Field(ge=-MAX_FRAMES, lt=0)], ...] = Field(
        (-3, -2, -1), min_length=1, description="latent frames of `end`, counted from its end: -1, -2, ..."
    )
    start_first_frame: FirstFrame = Field(0, description="frame of `start` at which reading starts; -1 is its last")
    end_first_frame: FirstFrame | None = Field(
        None,
        description="frame of `end` at which reading starts, to end with its beginning; default: end with its end",
    )
    preset: PresetName = Field(
        DEFAULT_PRESET, description="multipliers of start's and of end's frames, as in published examples, or exact"
    )
    multipliers: Multipliers | None = Field(
        None, description="one for all, start's then end's, or a ramp like 0.1..0.4"
    )
    encoding: Literal["each", "joint"] = Field(
        "each",
        description="each clip by itself, with the last frames of `end`; or as published, joint: the first frames of "
        "both, joined and encoded as one clip",
    )

    @model_validator(mode="after")
    def _check_combinations(self) -> "Transition":
        if self.multipliers is not None:
            self.refuse_unused(["preset"], "`multipliers` is set")
        if self.encoding == "joint":
            self.refuse_unused(
                ["start_first_frame", "end_first_frame"], "joint encoding takes the first frames of both"
            )
        return self

    def conditions(self) -> list[Condition]:
        """Return the latent frames of both clips, each at the index that it has in its own clip."""
        frames = (*self.start_frames, *self.end_frames)
        of_start, of_end = PRESETS[self.preset].transition
        published = [of_start] * len(self.start_frames) + [of_end] * len(self.end_frames)
        multipliers = per_frame(published if self.multipliers is None else self.multipliers, frames, "multipliers")
        if self.encoding == "joint":
            return [Condition(self.start, frames, frames, multipliers, joined=self.end)]
        cut = len(self.start_frames)
        start = Condition(
            self.start, self.start_frames, self.start_frames, multipliers[:cut], first_frame=self.start_first_frame
        )
        if self.end_first_frame is None:
            return [start, Condition(self.end, self.end_frames, self.end_frames, multipliers[cut:], from_end=True)]
        # From latent frame 1: latent frame 0 is one picture where each other is several frames, and would stand still.
        take = tuple(frame - min(self.end_frames) + 1 for frame in self.end_frames)
        end = Condition(self.end, take, self.end_frames, multipliers[cut:], first_frame=self.end_first_frame)
        return [start, end]
