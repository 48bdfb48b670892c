"""What every video task is: a job, and the latent frames it is given.

No torch here: manifests are checked without it. `pusa.generate` turns conditions into latents and levels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from pusa.errors import ConditionError
from pusa.strict import Strict

Multiplier = Annotated[float, Field(ge=0, le=1)]


class Settings(Strict):
    """What a job may set for itself, and `defaults` for all jobs."""

    prompt: str = Field("", max_length=10_000, description="what the video shows; empty is the null prompt")
    negative_prompt: str = Field("", max_length=10_000, description="what guidance leads away from")
    width: int = Field(848, ge=1, le=8192, description="pixels")
    height: int = Field(480, ge=1, le=8192, description="pixels")
    num_frames: int = Field(163, ge=1, le=10_000, description="frames; temporal * k + 1 of the backbone")
    fps: float = Field(24, gt=0, le=240, description="frames a second of the written video")
    steps: int = Field(64, ge=1, le=10_000, description="denoising steps")
    guidance: float = Field(4.5, ge=1, le=100, description="classifier-free guidance; 1 means no null pass")
    seed: int = Field(0, ge=0, lt=2**63, description="seeds the noise of this job alone")
    noise_schedule: str = Field("linear_quadratic", description="a name of `pusa list noise-schedules`")


@dataclass(frozen=True)
class Condition:
    """Latent frames that are given.

    `take` are indices into the latents of `source`, `place` indices into the result's; negative ones count from the
    end. A still picture has the one latent frame 0. A clip is read from its start, at most as long as the result;
    with `from_end` the last so many frames of it.
    """

    source: Path
    take: tuple[int, ...]
    place: tuple[int, ...]
    multipliers: tuple[float, ...]
    still: bool = False
    from_end: bool = False


class Job(Settings):
    """One video to make."""

    id: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=120, description="names the output files; unique"
    )
    task: str

    def conditions(self) -> list[Condition]:
        """The given latent frames; none by default.

        Raises:
            ConditionError: lengths that do not fit together.
        """
        return []


def spread(multipliers: float | Sequence[float], frames: Sequence[int], name: str) -> tuple[float, ...]:
    """One multiplier per given frame; a single number stands for all.

    Raises:
        ConditionError: there are more or fewer multipliers than frames.
    """
    if isinstance(multipliers, int | float):
        return (float(multipliers),) * len(frames)
    if len(multipliers) != len(frames):
        raise ConditionError(f"{name}: {len(multipliers)} multipliers for {len(frames)} frames {list(frames)}")
    return tuple(float(m) for m in multipliers)


def positions(indices: Sequence[int], count: int, what: str) -> tuple[int, ...]:
    """Indices with negative ones counted from the end.

    Raises:
        ConditionError: one lies outside, or two are the same.
    """
    for index in indices:
        if not -count <= index < count:
            raise ConditionError(
                f"{what} {index} is outside the {count} latent frames; allowed are {-count}..{count - 1}"
            )
    found = tuple(index % count for index in indices)
    if len(set(found)) != len(found):
        raise ConditionError(f"{what}: {list(indices)} names a latent frame twice")
    return found
